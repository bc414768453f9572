"""The voice: a flow head that samples sound, a chunk of 200 ms at a time, with an exact log-probability."""
