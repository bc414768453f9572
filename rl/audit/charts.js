// Curves over steps and the picture of sampler against learner, as SVG drawn to the width at hand.

const HEIGHT = 190, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 24;

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].map((m) => m * power).find((m) => m >= rough);
  const out = [];
  for (let v = Math.ceil(low / size - 1e-9) * size; v <= high + size * 1e-6; v += size) out.push(Math.abs(v) < size * 1e-6 ? 0 : v);
  return out;
}

// At most two points a pixel: the smallest and the largest value of its steps.
function thinned(steps, values, width) {
  const points = steps.map((s, i) => [s, values[i]]).filter((p) => p[1] !== null);
  if (points.length <= 2 * width) return points;
  const out = [], per = points.length / width;
  for (let i = 0; i < width; i++) {
    const some = points.slice(Math.floor(i * per), Math.floor((i + 1) * per));
    let low = some[0], high = some[0];
    for (const p of some) { if (p[1] < low[1]) low = p; if (p[1] > high[1]) high = p; }
    out.push(...(low === high ? [low] : low[0] < high[0] ? [low, high] : [high, low]));
  }
  return out;
}

function frame(width, xLow, xHigh, yLow, yHigh, xTicks) {
  const x = (v) => LEFT + ((v - xLow) / (xHigh - xLow || 1)) * (width - LEFT - RIGHT);
  const y = (v) => TOP + (1 - (v - yLow) / (yHigh - yLow || 1)) * (HEIGHT - TOP - BOTTOM);
  const root = svg("svg", { height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true" });
  for (const v of ticks(yLow, yHigh, 4)) {
    root.append(svg("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: y(v), y2: y(v) }),
      svg("text", { x: LEFT - 6, y: y(v) + 4, "text-anchor": "end" }, short(v)));
  }
  for (const v of xTicks) root.append(svg("text", { x: x(v), y: HEIGHT - 6, "text-anchor": "middle" }, whole(v)));
  return { root, x, y };
}

function curveChart(chart, steps) {
  const percent = chart.unit === "%";
  const show = (v) => (v === null ? "—" : percent ? `${(100 * v).toFixed(1)} %` : short(v));
  let lines = chart.lines.map((l) => ({ ...l, drawn: percent ? l.values.map((v) => (v === null ? null : 100 * v)) : l.values }));
  if (chart.stacked) {
    let below = steps.map(() => 0);
    lines = lines.map((l) => ({ ...l, below, drawn: (below = below.map((b, i) => b + (l.values[i] || 0))) }));
  }
  const seen = lines.flatMap((l) => l.drawn.filter((v) => v !== null));
  let low = seen.reduce((a, b) => Math.min(a, b), 0), high = seen.reduce((a, b) => Math.max(a, b), percent ? 100 : 0);
  if (low === high) high = low + 1;
  const readout = el("p", { class: "readout", "aria-live": "polite" });
  const plot = el("div", { class: "plot", tabindex: "0", role: "group", "aria-label": `${chart.title}: ${summary(chart, show)} Left and right arrow keys read single steps.` });
  let at = steps.length - 1, drawing = null;
  const read = (i) => {
    at = Math.max(0, Math.min(steps.length - 1, i));
    readout.textContent = `Step ${whole(steps[at])}: ` + chart.lines.map((l) => `${l.name} ${show(l.values[at])}`).join(" · ");
    if (drawing) { const x = drawing.x(steps[at]); for (const n of ["x1", "x2"]) drawing.cursor.setAttribute(n, x); drawing.cursor.removeAttribute("hidden"); }
  };
  const draw = () => {
    const width = Math.max(220, plot.clientWidth), first = steps[0], last = steps[steps.length - 1];
    const whole_ = ticks(first, Math.max(last, first + 1), 5).filter((v) => Number.isInteger(v) && v <= last);
    const { root, x, y } = frame(width, first, Math.max(last, first + 1), low, high * (low === 0 ? 1.04 : 1), whole_);
    for (const [k, l] of lines.entries()) {
      const points = thinned(steps, l.drawn, width).map(([s, v]) => `${x(s).toFixed(1)} ${y(v).toFixed(1)}`);
      if (chart.stacked) {
        const back = thinned(steps, l.below, width).reverse().map(([s, v]) => `${x(s).toFixed(1)} ${y(v).toFixed(1)}`);
        root.append(svg("path", { d: `M${points.join("L")}L${back.join("L")}Z`, fill: `var(--s${k})`, opacity: ".8" }));
      } else {
        root.append(svg("path", { class: "curve", stroke: `var(--s${k})`, d: `M${points.join("L")}` }));
        const sparse = l.drawn.filter((v) => v !== null).length;
        if (sparse <= 40) for (const p of points) { const [cx, cy] = p.split(" "); root.append(svg("circle", { cx, cy, r: 3, fill: `var(--s${k})` })); }
      }
    }
    for (const s of chart.marks || []) {
      root.append(svg("path", { d: `M${x(s)} ${y(low) - 6}l6 6l-6 6l-6 -6z`, fill: "var(--card)", stroke: "var(--good)", "stroke-width": 2 },
        svg("title", {}, `Step ${s}: episodes re-scored`)));
    }
    const cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, hidden: true });
    root.append(cursor);
    drawing = { x, cursor };
    plot.replaceChildren(root);
  };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect(), share = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
    const step = steps[0] + share * (steps[steps.length - 1] - steps[0]);
    let i = steps.findIndex((s) => s >= step);
    if (i < 0) i = steps.length - 1;
    if (i > 0 && step - steps[i - 1] < steps[i] - step) i -= 1;
    read(i);
  });
  plot.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1, PageUp: at - 50, PageDown: at + 50 };
    if (event.key in moves) { event.preventDefault(); read(moves[event.key]); }
  });
  plot.addEventListener("focus", () => read(at));
  new ResizeObserver(draw).observe(plot);
  const columns = [{ name: "step", cell: (i) => whole(steps[i]) }, ...chart.lines.map((l) => ({ name: l.name, num: true, cell: (i) => show(l.values[i]) }))];
  return figure(chart, lines.map((l, k) => [l.name, `var(--s${k})`]), [plot, readout],
    drawer("Numbers", () => paged(chart.title, columns, steps.map((_, i) => i), 20)));
}

function summary(chart, show) {
  return chart.lines.map((l) => {
    const values = l.values.filter((v) => v !== null);
    const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
    return low === high ? `${l.name} ${show(low)} throughout.` : `${l.name} from ${show(values[0])} to ${show(values[values.length - 1])}, between ${show(low)} and ${show(high)}.`;
  }).join(" ");
}

function figure(chart, legend, body, more) {
  const title = el("h3", {}, [chart.title, chart.unit ? el("span", { class: "unit" }, ` · ${chart.unit}`) : null]);
  return el("article", { class: "card chart" }, [
    el("header", {}, title),
    legend.length > 1 ? el("ul", { class: "legend" }, legend.map(([name, colour]) => {
      const swatch = el("i", { "aria-hidden": "true" }); swatch.style.background = colour; return el("li", {}, [swatch, name]); })) : null,
    body, chart.note ? el("p", { class: "note" }, chart.note) : null, more]);
}

function scatterChart(s) {
  const chart = {
    title: "Sampler against learner", unit: "log-prob of each token, nats",
    note: `${plural(s.tokens, "re-scored token")}; darker cells hold more. ` + (s.differing ? `${whole(s.differing)} differ: drawn as crosses.` : "Every one lies on the diagonal, bit for bit."),
  };
  const plot = el("div", { class: "plot", role: "img", "aria-label": `${chart.title}. ${chart.note}` });
  new ResizeObserver(() => {
    const width = Math.max(220, plot.clientWidth), most = Math.log1p(s.counts.reduce((a, c) => Math.max(a, c[2]), 1));
    const { root, x, y } = frame(width, s.low, s.high, s.low, s.high, ticks(s.low, s.high, 4));
    const cell = (s.high - s.low) / s.cells, w = x(s.low + cell) - x(s.low), h = y(s.low) - y(s.low + cell);
    root.append(svg("line", { class: "axis", x1: x(s.low), y1: y(s.low), x2: x(s.high), y2: y(s.high) }));
    for (const [i, j, n] of s.counts) root.append(svg("rect", {
      x: x(s.low + i * cell) - 1, y: y(s.low + (j + 1) * cell) - 1, width: w + 2, height: h + 2, rx: 1.5, fill: "var(--s0)", opacity: 0.25 + 0.75 * Math.log1p(n) / most }));
    for (const [a, b] of s.points) root.append(svg("path", { d: `M${x(a) - 4} ${y(b) - 4}l8 8m0 -8l-8 8`, stroke: "var(--bad)", "stroke-width": 2 }));
    root.append(svg("text", { x: width - RIGHT, y: HEIGHT - BOTTOM - 6, "text-anchor": "end" }, "sampler →"), svg("text", { x: LEFT + 6, y: TOP + 10 }, "↑ learner"));
    plot.replaceChildren(root);
  }).observe(plot);
  return figure(chart, [], plot, null);
}
