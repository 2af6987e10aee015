"""The timeline of a main loop as a picture. Needs matplotlib."""

from . import sim

COLOURS = {  # of what keeps a warp from issuing
    "issuing": "#4c72b0",
    sim.TENSOR: "#dd8452",
    sim.MBARRIER: "#c44e52",
    sim.BARRIER: "#8172b3",
    sim.BOARD: "#937860",
    sim.TAKEN: "#ccccdd",
    sim.FIXED: "#e8e8e8",
}
PIPE = "#ccb974"


def draw(model, out, run, path, iterations=2):
    """Writes `iterations` iterations: the tensor cores, the exponential unit, and what each warp waits for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    clocks, _, s, _, _ = run
    start = s.warps[0].starts[-1 - iterations]
    span = clocks * iterations
    warps = [w for w in s.warps if w.role == "consumer"]
    names = ["tensor cores", "MUFU", *("warpgroup " + "ABCDEFGH"[w.wg] for w in warps)]
    figure, axes = pyplot.subplots(figsize=(11, 0.45 * len(names) + 1.3), dpi=110)
    colour_of = {w.wg: ("#2f5d9b", "#9bbbdd", "#55a868")[n % 3] for n, w in enumerate(warps)}

    def bar(row, begin, length, colour):
        begin, end = max(begin - start, 0), min(begin - start + length, span)
        if end > begin:
            axes.broken_barh([(begin, end - begin)], (row - 0.4, 0.8), facecolors=colour, linewidth=0)

    for begin, end, wg, _, _ in s.mma_log:
        bar(0, begin, end - begin, colour_of[wg])
    for t in s.mufu_log:
        bar(1, t, model.par["mufu_issue"], "#55a868")
    for n, w in enumerate(warps):
        bar(2 + n, start, span, COLOURS["issuing"])
        for t, wg, reason, length in s.state_log:
            if wg == w.wg:
                bar(2 + n, t, length, COLOURS.get(reason, PIPE))
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, span)
    axes.invert_yaxis()
    axes.set_xlabel("clocks of an SM (predicted, not measured)")
    axes.set_title(
        f"{iterations} iterations, {out['clocks']:.0f} clocks each; tensor cores: dark for A, light for B", fontsize=10
    )
    handles = [Patch(color=c, label=label) for label, c in COLOURS.items()] + [Patch(color=PIPE, label="pipe busy")]
    axes.legend(
        handles=handles,
        ncol=len(handles),
        loc="upper center",
        bbox_to_anchor=(0.45, -0.32),
        fontsize=7.5,
        frameon=False,
    )
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
