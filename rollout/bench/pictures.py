"""Pictures of benches, as PNG. Imports matplotlib, which takes a second: import this where one is drawn."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

from rollout.bench.hour_result import Hour

MIB = 2**20


def hour_picture(hour: Hour, tolerance: float) -> bytes:
    """Cost of a micro-turn and memory over the session's minutes; a band of ``tolerance`` around the first cost with
    full windows."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    cost, memory = figure.subplots(1, 2)
    minutes = [p.chunks / 300 for p in hour.points]
    first, full, end = hour.points[0], hour.full_chunks / 300, hour.chunks / 300
    cost.plot(minutes, [p.chunk_ms for p in hour.points], color="tab:blue", linewidth=1, label="the session")
    cost.plot([0.95 * end], [hour.end_ms], "o", color="tab:blue", label="its last tenth")
    young = "a young session with full windows, in turns with it"
    cost.plot([0.95 * end], [hour.young_ms], "x", color="tab:orange", markersize=9, label=young)
    low, high = (hour.begin_ms * (1 + sign * tolerance) for sign in (-1, 1))
    cost.axhspan(low, high, color="tab:blue", alpha=0.12, label=f"± {tolerance:.0%} of the first with full windows")
    cost.set(title="cost of a micro-turn", ylabel="ms", ylim=(0, None))
    for name, colour, style, values in (
        ("the process", "tab:orange", "-", [p.process_bytes - first.process_bytes for p in hour.points]),
        (
            "the record, that is the episode",
            "tab:grey",
            "--",
            [p.record_bytes - first.record_bytes for p in hour.points],
        ),
    ):
        memory.plot(minutes, [v / MIB for v in values], style, color=colour, label=name)
    state = f"the session's state, {hour.state_bytes / MIB:.1f} MiB from the start"
    memory.plot(minutes, [0.0] * len(minutes), color="tab:green", label=state)
    memory.set(title="memory added since the first point", ylabel="MiB")
    for axes in (cost, memory):
        axes.axvline(full, color="tab:red", linestyle=":", label="windows full")
        axes.set_xlabel("minutes")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
