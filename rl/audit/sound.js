// Both sides of an episode aloud. The sound is in this file; the grid's cursor runs with it, and chooses where it goes on.

const PLAY = "▶ Play both sides", PAUSE = "⏸ Pause";

// read(k): moves the cursor to chunk k.
function player(sound, chunks, read) {
  const note = el("span", {}, sound.note);
  if (!sound.mp3) return { node: el("p", { class: "note" }, note), seek: () => {}, playing: () => false };
  const audio = el("audio", { src: `data:audio/mpeg;base64,${sound.mp3}`, preload: "auto" });
  const button = el("button", { type: "button", onclick: () => (audio.paused ? audio.play().catch(broken) : audio.pause()) }, PLAY);
  const broken = () => { if (audio.error) { button.disabled = true; note.textContent = "This browser cannot play the sound."; } };
  let at = -1;
  const follow = () => {
    const k = Math.min(chunks - 1, Math.floor(audio.currentTime * 1000 / CHUNK_MS + 1e-3));
    if (k !== at) read(at = k);
  };
  const run = () => { if (audio.paused) return; follow(); requestAnimationFrame(run); };
  const label = () => { button.textContent = audio.paused ? PLAY : PAUSE; };
  put(audio, { onplay: () => { label(); run(); }, onpause: label, onended: label, onseeked: follow, onerror: broken });
  return {
    node: el("p", { class: "player" }, [button, note, audio]),  // a sound that is taken out of the page pauses by itself
    seek: (k) => { at = k; audio.currentTime = k * CHUNK_MS / 1000; },
    playing: () => !audio.paused,
  };
}
