// The list of episodes: searched, filtered and sorted by their short rows; an episode's block is unpacked when it opens.

const STATES = { identical: ["equal", "good"], different: ["differs", "bad"], not_comparable: ["not comparable", "warn"], not_rescored: ["not re-scored", ""] };
const MASKS = ["mode", "first word", "next word or end"];
const FILTERS = {
  all: ["all", () => true],
  missed: ["with something missed", (r) => r.missed > 0],
  spurious: ["with spurious speech", (r) => r.spurious > 0],
  sound: ["with sound", (r) => r.sound],
  perfect: ["score 100 %", (r) => r.score === 1],
  different: ["bits that differ", (r) => r.state === "different"],
  not_comparable: ["not comparable", (r) => r.state === "not_comparable"],
  not_rescored: ["not re-scored", (r) => r.state === "not_rescored"],
};
const ORDERS = {
  file: ["as sampled", (r) => r.at],
  low: ["lowest score first", (r) => (r.score === null ? 9 : r.score)],
  high: ["highest score first", (r) => (r.score === null ? 9 : -r.score)],
  unequal: ["most differing tokens first", (r) => -r.unequal - r.rows],
};

// One for each axis of reward that some of the episodes have.
const axesOf = (rows) => [...new Set(rows.flatMap((r) => Object.keys(r.rewards)))];
const lowest = (axis) => [`lowest ${axis} reward first`, (r) => r.rewards[axis] ?? 1e9];
const named = (axis) => axis[0].toUpperCase() + axis.slice(1);

const opened = new Map();
function unpack(block) {
  if (!opened.has(block)) {
    const bytes = Uint8Array.from(atob(byId(`block-${block}`).textContent), (c) => c.charCodeAt(0));
    opened.set(block, new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json());
  }
  return opened.get(block);
}

function choice(label, options, onchange) {
  const select = el("select", { onchange }, Object.entries(options).map(([value, text]) => el("option", { value }, text)));
  return [select, el("label", {}, [label, select])];
}

function episodeBrowser(rows) {
  rows.forEach((r, at) => { r.at = at; r.text = `${r.name} ${r.said}`.toLowerCase(); });
  const families = [...new Set(rows.map((r) => r.family))], steps = [...new Set(rows.map((r) => r.step))];
  const first = (entries) => Object.fromEntries(Object.entries(entries).map(([k, v]) => [k, v[0]]));
  const kinds = first(Object.fromEntries(Object.entries(FILTERS).filter(([k, v]) => k === "all" || rows.some(v[1]))));
  const list = el("div", { class: "card" }), detail = el("div", { class: "card detail", "aria-live": "off" });
  const status = el("p", { class: "hint", role: "status" });
  let found = rows, current = null;
  const search = el("input", { type: "search", placeholder: "words, scenario, e.g. breathe", autocomplete: "off", oninput: () => filter() });
  const [family, familyLabel] = choice("Family", { "": "all", ...Object.fromEntries(families.map((f) => [f, f])) }, () => filter());
  const [step, stepLabel] = choice("Step", { "": "all", ...Object.fromEntries(steps.map((s) => [` ${s}`, whole(s)])) }, () => filter());
  const [kind, kindLabel] = choice("Show", kinds, () => filter());
  const axes = axesOf(rows), orders = { ...ORDERS, ...Object.fromEntries(axes.map((axis) => [`axis ${axis}`, lowest(axis)])) };
  const [order, orderLabel] = choice("Order", first(orders), () => filter());

  const columns = [
    { name: "Episode", cell: (r) => el("button", { type: "button" }, r.name) },
    { name: "Step", num: true, cell: (r) => whole(r.step) },
    { name: "Score", num: true, cell: (r) => (r.score === null ? "—" : `${(100 * r.score).toFixed(0)} %`) },
    ...axes.map((axis) => ({ name: named(axis), num: true, cls: "optional", cell: (r) => signed(r.rewards[axis] ?? null) })),
    { name: "Tokens", num: true, cls: "optional", cell: (r) => whole(r.tokens) },
    { name: "Bits", cls: "state", cell: (r) => el("span", { class: STATES[r.state][1] }, STATES[r.state][0] + (r.state === "different" ? ` (${r.unequal}, rows ${r.rows})` : "")) },
    { name: "Said", cls: "said optional", cell: (r) => r.said || "nothing" },
  ];
  const size = 10;
  function draw() {
    const place = current ? found.indexOf(current) : -1;
    list.replaceChildren(paged("Saved episodes", columns, found, size, {
      cls: "rows", hideCaption: true, first: place < 0 ? 0 : place - (place % size),
      row: (r) => ({ "aria-current": r === current ? "true" : null, onclick: () => open(r, true) }),
    }));
  }
  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean), key = orders[order.value][1];
    found = rows.filter((r) => (!family.value || r.family === family.value) && (!step.value || ` ${r.step}` === step.value)
      && FILTERS[kind.value][1](r) && words.every((w) => r.text.includes(w)));
    found.sort((a, b) => key(a) - key(b) || a.at - b.at);
    status.textContent = `${whole(found.length)} of ${plural(rows.length, "episode")}.`;
    draw();
  }
  async function open(row, focus) {
    current = row;
    draw();
    const block = await unpack(row.block);
    if (current !== row) return;
    const place = found.indexOf(row);
    const move = (text, to) => el("button", { type: "button", disabled: !found[to], onclick: () => open(found[to], true) }, text);
    const title = el("h3", { tabindex: "-1" }, `${row.name}, step ${whole(row.step)}`);
    detail.replaceChildren(el("header", {}, [title, el("div", {}, [move("← Previous", place - 1), move("Next →", place < 0 ? 0 : place + 1)])]),
      ...episodeDetail(row, block.episodes[row.place], block, detail.clientWidth));
    if (focus) title.focus({ preventScroll: false });
  }
  filter();
  if (found.length) open(found.find((r) => r.state === "different") || found.find((r) => r.said) || found[0], false);
  return el("div", { class: "stack" }, [
    el("div", {}, [el("form", { class: "controls", role: "search", onsubmit: (e) => e.preventDefault() }, [
      el("label", { class: "search" }, ["Search", search]), familyLabel, stepLabel, kindLabel, orderLabel]), status, list]),
    detail]);
}

function episodeDetail(row, detail, block, room) {
  const said = { identical: `All ${plural(row.tokens, "sampled token")} re-scored: log-probs and whole rows equal, bit for bit.`,
    different: `${plural(row.unequal, "log-prob")} and ${plural(row.rows, "whole row")} of ${plural(row.tokens, "sampled token")} differ.`,
    not_comparable: `Not comparable: ${detail.why_not}.`, not_rescored: "Not re-scored: nothing is claimed about its bits." }[row.state];
  const events = [
    { name: "Chunk", cell: (e) => whole(e[0]) }, { name: "Time", num: true, cell: (e) => `${(e[0] * CHUNK_MS / 1000).toFixed(1)} s` },
    { name: "Event", cell: (e) => e[1] }, { name: "Outcome", cell: (e) => el("span", { class: { hit: "good", shaping: "" }[e[2]] ?? "bad" }, OUTCOMES[e[2]]) },
    { name: "Due", num: true, cell: (e) => whole(e[3]) },
    ...Object.keys(row.rewards).map((axis) => ({ name: named(axis), num: true, cell: (e) => signed(e[4][axis]) })),
  ];
  const tokens = [
    { name: "Chunk", cell: (t) => whole(t[0]) }, { name: "Token", cell: (t) => t[1] }, { name: "Allowed", cell: (t) => MASKS[t[2]] ?? "?" },
    { name: "Sampler", num: true, cls: "mono", cell: (t) => t[3] },
    { name: "Learner", num: true, cls: "mono", cell: (t) => (row.state === "not_comparable" || row.state === "not_rescored" ? "—" : t[4] ?? t[3]) },
    { name: "Bits", cell: (t) => (row.state.startsWith("not") ? "—" : el("span", { class: t[4] !== null || t[5] ? "bad" : "good" }, t[4] !== null ? "token differs" : t[5] ? "row differs" : "equal")) },
  ];
  const order = detail.tokens.map((t, i) => i).sort((a, b) => wrong(detail.tokens[b]) - wrong(detail.tokens[a]) || a - b);
  return [
    el("p", { class: STATES[row.state][1] }, said),
    episodeGrid(detail, block.cells, block.pictures, row.name, room),
    el("div", { class: "columns" }, [
      el("div", {}, detail.rewards ? paged("Rewards by event (rules)", events, detail.events, 8) : el("p", { class: "note" }, "Not judged: its facts, or the recipe, cannot be read.")),
      el("div", {}, paged("Log-probs of sampled tokens, nats", tokens, order.map((i) => detail.tokens[i]), 8))])];
}
const wrong = (t) => Number(t[4] !== null || Boolean(t[5]));
