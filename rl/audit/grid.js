// One episode on the 200 ms grid: a column a chunk, a lane for what was heard, seen, said, rewarded and how probable it was.

const CHUNK_MS = 200, CHANNELS = 80, FRAMES = 4, NATS = 6;
const LANES = { time: [0, 16], heard: [18, 80], user: [100, 17], model: [121, 62], mode: [186, 11], events: [200, 22], reward: [225, 52], logprob: [281, 52], seen: [337, 26] };
const gridHeight = (detail) => (detail.seen.length ? 366 : 335);
const PICTURE = 124;  // pixels of the picture beside the grid
let COLUMN = 16;  // pixels of a chunk, as the room allows
const STOPS = ["0b0724", "2c115f", "721f81", "b63679", "f1605d", "feae76", "fcfdbf"].map((h) => [0, 2, 4].map((i) => parseInt(h.slice(i, i + 2), 16)));
const AXES = ["var(--s0)", "var(--s1)", "var(--s3)", "var(--s2)"];  // colours of an episode's axes of reward, in order
const OUTCOMES = { hit: "hit", wrong: "wrong words", missed: "missed", spurious: "spurious", shaping: "shaping" };

function colour(code) {
  const place = (code / 15) * (STOPS.length - 1), i = Math.min(STOPS.length - 2, Math.floor(place));
  return STOPS[i].map((v, k) => Math.round(v + (STOPS[i + 1][k] - v) * (place - i)));
}
const PALETTE = Array.from({ length: 16 }, (_, code) => colour(code));

// audio: one index into cells a chunk; a cell is 4 frames x 80 channels, a hexadecimal digit each.
function spectrogram(audio, cells) {
  const canvas = el("canvas", { width: Math.max(1, audio.length * FRAMES), height: CHANNELS });
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, CHANNELS);
  audio.forEach((index, chunk) => {
    const cell = cells[index];
    for (let f = 0; f < FRAMES; f++) for (let c = 0; c < CHANNELS; c++) {
      const [r, g, b] = PALETTE[parseInt(cell[f * CHANNELS + c], 16)], at = 4 * ((CHANNELS - 1 - c) * canvas.width + chunk * FRAMES + f);
      image.data.set([r, g, b, 255], at);
    }
  });
  context.putImageData(image, 0, 0);
  return canvas.toDataURL();
}

const png = (picture) => `data:image/png;base64,${picture}`;

function episodeGrid(detail, cells, pictures, name, room) {
  const GRID_HEIGHT = gridHeight(detail);
  const chunks = detail.actions.length;
  COLUMN = Math.max(15, Math.min(26, Math.floor((room - 100) / Math.max(1, chunks))));
  const width = chunks * COLUMN;
  const root = svg("svg", { width, height: GRID_HEIGHT, viewBox: `0 0 ${width} ${GRID_HEIGHT}`, "aria-hidden": "true" });
  const box = (lane, first, last, cls, inset = 0) => svg("rect", { class: cls, x: first * COLUMN + inset, y: LANES[lane][0], width: (last - first + 1) * COLUMN - 2 * inset, height: LANES[lane][1] });
  const middle = (lane) => LANES[lane][0] + LANES[lane][1] / 2;
  for (let k = 0; k < chunks; k += 5) root.append(
    svg("line", { class: "rule", x1: k * COLUMN, x2: k * COLUMN, y1: 14, y2: GRID_HEIGHT }), svg("text", { class: "tick", x: k * COLUMN + 2, y: 11 }, `${k / 5} s`));
  root.append(svg("image", { href: spectrogram(detail.audio, cells), x: 0, y: LANES.heard[0], width: detail.audio.length * COLUMN, height: LANES.heard[1], preserveAspectRatio: "none" }));
  for (const [first, last, kind, text] of detail.user) {
    root.append(box("user", first, last, `user-${kind}`, 0.5));
    if ((last - first + 1) * COLUMN > 6.5 * text.length) root.append(svg("text", { x: first * COLUMN + 3, y: middle("user") + 4 }, text));
  }
  root.append(box("model", 0, chunks - 1, "void"));
  detail.actions.forEach(([mode, ...words], k) => {
    root.append(box("mode", k, k, `mode-${mode}`, 0.5));
    const x = k * COLUMN + COLUMN / 2 + 4, y = LANES.model[0] + LANES.model[1] - 4;
    if (words.length) root.append(svg("text", { transform: `translate(${x} ${y}) rotate(-90)` }, clip(words.join(" "), 10)));
  });
  drawEvents(root, detail.events, middle("events"));
  if (detail.rewards) drawRewards(root, detail, LANES.reward);
  drawLogprobs(root, detail.tokens, LANES.logprob);
  for (const [k, first] of detail.seen) root.append(
    svg("image", { href: png(pictures[first]), x: k * COLUMN + 0.5, y: LANES.seen[0], width: COLUMN - 1, height: LANES.seen[1], class: "pixels", preserveAspectRatio: "xMidYMid slice" }));
  return cursor(root, detail, pictures, name, chunks);
}
const clip = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);

function drawEvents(root, events, y) {
  for (const [chunk, kind, outcome, due] of events) {
    if (outcome === "shaping") continue;
    const x = chunk * COLUMN + COLUMN / 2;
    const shapes = { hit: "M-5 0l4 4l6 -8", missed: "M-4 -4l8 8m0 -8l-8 8", wrong: "M-4 -4l8 8m0 -8l-8 8", spurious: "M0 -5l5 9h-10z" };
    if (due !== null) root.append(svg("rect", { class: "o-due", x: due * COLUMN + 2, y: y - 8, width: COLUMN - 4, height: 16, rx: 3 }));
    root.append(svg("path", { d: shapes[outcome], transform: `translate(${x} ${y})`, fill: outcome === "spurious" ? "var(--bad)" : "none", stroke: outcome === "hit" ? "var(--good)" : "var(--bad)", "stroke-width": 2.2 },
      svg("title", {}, `${kind}: ${OUTCOMES[outcome]}`)));
  }
}

function drawRewards(root, detail, [top, height]) {
  const axes = Object.values(detail.rewards), all = axes.flat().map(Math.abs), bar = 12 / axes.length, scale = (height / 2 - 2) / Math.max(1, ...all), zero = top + height / 2;
  axes.forEach((values, i) => values.forEach((v, k) => {
    if (v) root.append(svg("rect", { fill: AXES[i % AXES.length], x: k * COLUMN + COLUMN / 2 - 6 + i * bar, width: bar, y: v > 0 ? zero - v * scale : zero, height: Math.abs(v) * scale }));
  }));
  root.append(svg("line", { class: "rule", x1: 0, x2: detail.actions.length * COLUMN, y1: zero, y2: zero }));
}

// Bars hang from probability 1: the longer, the less probable the token was.
function drawLogprobs(root, tokens, [top, height]) {
  const of = new Map();
  for (const t of tokens) of.set(t[0], [...(of.get(t[0]) || []), t]);
  root.append(svg("line", { class: "rule", x1: 0, x2: Number(root.getAttribute("width")), y1: top, y2: top }));
  for (const [chunk, some] of of) some.forEach((t, i) => {
    const width = (COLUMN - 2) / some.length, wrong = t[4] !== null || t[5], size = Math.min(NATS, Math.max(0, -Number(t[3]))) || 0;
    root.append(svg("rect", { class: wrong ? "p-differs" : "p-equal", x: chunk * COLUMN + 1 + i * width, width: Math.max(1, width - 1), y: top, height: Math.max(1.5, (size / NATS) * height) }));
  });
}

// The frames of the last chunk up to k that has some, each as an image.
function frames(detail, pictures, k) {
  const seen = detail.seen.filter(([chunk]) => chunk <= k).at(-1);
  if (!seen) return [];
  return seen.slice(1).map((place, i) => el("img", { src: png(pictures[place]), height: PICTURE, class: "pixels",
    alt: `frame ${i + 1} of ${seen.length - 1} of chunk ${seen[0]}` }));
}

function cursor(root, detail, pictures, name, chunks) {
  const pick = svg("rect", { class: "pick", y: 1, width: COLUMN, height: gridHeight(detail) - 2, rx: 3 });
  const shown = el("p", { class: "frames" }, frames(detail, pictures, 0));
  const readout = el("p", { class: "readout", "aria-live": "polite" }, "Point at a chunk, or focus the grid and use the arrow keys.");
  const lanes = el("div", { class: "lanes", tabindex: "0", role: "group", "aria-label": `200 ms grid of ${name}, ${chunks} chunks. Left and right arrow keys read single chunks; the tables below hold the same.` }, root);
  let at = -1;
  const aloud = detail.sound ? player(detail.sound, chunks, (k) => read(k, true)) : null;
  const choose = (k) => { read(k, true); if (aloud) aloud.seek(at); };
  const read = (k, follow) => {
    at = Math.max(0, Math.min(chunks - 1, k));
    pick.setAttribute("x", at * COLUMN);
    if (!pick.parentNode) root.append(pick);
    readout.setAttribute("aria-live", aloud?.playing() ? "off" : "polite");
    readout.textContent = describe(detail, at);
    shown.replaceChildren(...frames(detail, pictures, at));
    if (follow) lanes.scrollLeft = Math.max(0, (at + 0.5) * COLUMN - lanes.clientWidth / 2);
  };
  const pointed = (event) => Math.floor((event.clientX - root.getBoundingClientRect().left) / COLUMN);
  root.addEventListener("pointermove", (event) => { if (!aloud?.playing()) read(pointed(event), false); });
  if (aloud) root.addEventListener("click", (event) => choose(pointed(event)));
  lanes.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: chunks - 1, PageUp: at - 5, PageDown: at + 5 };
    if (event.key in moves) { event.preventDefault(); choose(moves[event.key]); }
  });
  const video = detail.seen.length ? { seen: "seen: video frames" } : {};
  const labels = { heard: "heard: user, 0–8 kHz (mel)", user: "user", model: "model: its words", mode: "mode", events: "events", reward: "reward", logprob: `log-prob, 0 to −${NATS}`, ...video };
  const names = el("div", { class: "names", "aria-hidden": "true" }, Object.entries(labels).map(([lane, text]) => {
    const span = el("span", {}, text); span.style.top = `${LANES[lane][0] + LANES[lane][1] / 2}px`; return span; }));
  return el("div", {}, [aloud?.node, el("div", { class: "grid" }, [names, lanes]), gridLegend(Object.keys(detail.rewards || {})), readout,
    ...(detail.seen.length ? [shown] : [])]);
}

function gridLegend(axes) {
  const items = [["var(--s0)", "speaks"], ...axes.map((axis, i) => [AXES[i % AXES.length], `${axis} reward`]), ["var(--s2)", "log-prob, bits equal or not re-scored"], ["var(--bad)", "bits differ"]];
  const swatches = items.map(([fill, text]) => { const i = el("i", { "aria-hidden": "true" }); i.style.background = fill; return el("li", {}, [i, text]); });
  return el("ul", { class: "legend" }, [...swatches, el("li", {}, "✓ hit   ✕ missed or wrong words   ▲ spurious   ▢ due")]);
}

function describe(detail, k) {
  const [mode, ...words] = detail.actions[k], parts = [`Chunk ${k}, ${(k * CHUNK_MS / 1000).toFixed(1)} to ${((k + 1) * CHUNK_MS / 1000).toFixed(1)} s`];
  for (const [first, last, kind] of detail.user) if (first <= k && k <= last) parts.push(`user: ${kind}`);
  parts.push(words.length ? `${mode}: “${words.join(" ")}”` : mode);
  for (const [chunk, kind, outcome, due, rewards] of detail.events) {
    const earned = Object.entries(rewards).map(([axis, reward]) => `${axis} ${signed(reward)}`).join(", ");
    if (chunk === k) parts.push(`${kind} ${OUTCOMES[outcome]}${due === null ? "" : ` (due ${due})`}: ${earned}`);
  }
  const here = detail.seen.find(([chunk]) => chunk === k);
  if (here) parts.push(here.length > 2 ? "two frames" : "a frame");
  for (const t of detail.tokens) if (t[0] === k) parts.push(`${t[1]} ${t[3]}`);
  return parts.join(" · ");
}
