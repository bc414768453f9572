// Fills the page from the data inside it.

const data = JSON.parse(byId("data").textContent), report = data.report;

function theme() {
  const names = ["system", "light", "dark"], button = byId("theme"), root = document.documentElement;
  let now = "system";
  try { now = localStorage.getItem("metronome-audit-theme") || "system"; } catch { /* a file without storage: not kept */ }
  const apply = () => {
    if (now === "system") root.removeAttribute("data-theme"); else root.setAttribute("data-theme", now);
    button.textContent = `Theme: ${now}`;
  };
  button.addEventListener("click", () => {
    now = names[(names.indexOf(now) + 1) % names.length];
    try { localStorage.setItem("metronome-audit-theme", now); } catch { /* as above */ }
    apply();
  });
  apply();
}

function facts(pairs) {
  for (const [name, value, cls] of pairs) byId("facts").append(el("div", {}, [el("dt", {}, name), el("dd", { class: cls }, value)]));
}

// Fills a section, or hides it and its link when there is nothing to show.
function section(id, body, content) {
  const children = [content].flat().filter(Boolean);
  if (children.length) { byId(body).append(...children); return; }
  byId(id).hidden = true;
  document.querySelector(`nav a[href="#${id}"]`).hidden = true;
}
const card = (title, body) => el("div", { class: "card" }, [el("h3", {}, title), body]);
const bullets = (items) => el("ul", { class: "list" }, items.map((text) => el("li", {}, text)));
const count = (n) => el("span", { class: n ? "bad" : "" }, whole(n));

function counts(report) {
  const own = { name: "the run's own records", ...report.records, episodes: null };
  const parts = report.parts.map((p) => ({ name: `step ${whole(p.step)}, saved episodes`, ...p, not_comparable: p.not_comparable }));
  const columns = [
    { name: "Compared", cell: (p) => p.name },
    { name: "Tokens", num: true, cell: (p) => whole(p.num_tokens) },
    { name: "Tokens differ", num: true, cell: (p) => (p.num_tokens ? count(p.num_unequal) : "—") },
    { name: "Rows differ", num: true, cell: (p) => (p.num_tokens ? count(p.rows_unequal) : "—") },
    { name: "Episodes re-scored", num: true, cls: "optional", cell: (p) => (p.episodes === null ? "—" : `${whole(p.rescored)} of ${whole(p.episodes)}`) },
    report.not_comparable.episodes && { name: "Not comparable", num: true, cls: "optional", cell: (p) => (p.episodes === null ? "—" : whole(p.not_comparable)) },
    { name: "Weights", cls: "mono optional", cell: (p) => (p.checkpoint_digest ? p.checkpoint_digest.slice(0, 12) : "—") },
  ];
  return paged("Sampler against learner", columns.filter(Boolean), [own, ...parts], 12);
}

function runPage() {
  facts([[`Tokens ${report.basis === "records" ? "on record" : "re-scored"}`, whole(report.num_tokens)], ["Tokens that differ", whole(report.num_unequal)], ["Rows that differ", whole(report.rows_unequal)],
    ...(report.verdict === "different" ? [["k1, nats", short(report.k1)], ["k3, nats", short(report.k3)], ["Largest difference, nats", short(report.max_abs)]] : []),
    ["Processes", report.run.processes === null ? "unknown" : whole(report.run.processes)],
    ["Steps on record", report.run.steps_planned ? `${whole(report.run.steps_recorded)} of ${whole(report.run.steps_planned)}` : whole(report.run.steps_recorded)],
    ["Contract", report.contract.run ?? "unknown", "mono"]]);
  const conflicts = report.not_comparable, first = report.first_difference, why = report.diagnosis;
  const said = [
    first && card("The first difference", bullets([
      `Step ${whole(first.step)}, episode ${first.episode}, ${first.token === null ? `the sound of chunk ${first.chunk}` : `token ${first.position} (chunk ${first.chunk}, id ${first.token})`}.`,
      `The sampler's log-prob is ${first.sampler}, the learner's ${first.learner}; the whole row ${first.row_differs ? "differs" : "is equal"}.`])),
    why && card("Where sampler and learner part", bullets([
      why.first ? `Step ${whole(why.step)}: the first result that differs is ${why.first.name}, at row ${why.first.first_row}, by ${short(why.first.max_abs)} at most; sampler: ${why.first.sampler}; learner: ${why.first.learner}.` : `Step ${whole(why.step)}, replayed: every op of sampler and learner gives equal bits.`,
      ...why.suspects.map((s) => `Suspect: ${s}.`)])),
    (conflicts.episodes || conflicts.contradictions.length) && card("Not comparable, which is not the same as not equal", el("div", {}, [
      bullets([...conflicts.contradictions, ...Object.entries(conflicts.reasons).map(([reason, n]) => `${plural(n, "episode")}: other ${reason}.`)]),
      conflicts.episodes ? drawer(`The first ${conflicts.first.length} of them`, () => paged("Episodes that cannot be compared", [
        { name: "Episode", cell: (c) => c.episode }, { name: "Step", num: true, cell: (c) => whole(c.step) }, { name: "Differs in", cell: (c) => c.reason }, { name: "What", cell: (c) => c.text }], conflicts.first, 10)) : null])),
    report.gaps.length && card("Gaps", bullets(report.gaps)),
    card("What this report cannot show", bullets(report.cannot_show)),
  ];
  section("compared", "compared-body", el("div", { class: "columns wide" }, [el("div", { class: "card" }, counts(report)), el("div", { class: "stack" }, said.filter(Boolean))]));
  section("episodes", "browser", data.episodes.length ? episodeBrowser(data.episodes) : null);
}

function comparePage() {
  facts([["Steps compared", whole(report.steps_compared)], ["Steps that differ", whole(report.steps_unequal)], ["Episodes compared", whole(report.episodes_compared)],
    ["Tokens compared", whole(report.num_tokens)], ["Tokens that differ", whole(report.num_unequal)], ["Contract", report.contract.a ?? "unknown", "mono"]]);
  const said = [
    report.first_step && card("The first step that differs", bullets([`Step ${whole(report.first_step.step)}: ${report.first_step.fields.join(", ")}.`])),
    report.reasons.length && card("Not comparable, which is not the same as not equal", bullets(report.reasons)),
    card(report.recipe.length ? "Recipes: fields that differ" : "Recipes", report.recipe.length ? paged("Fields that differ", [{ name: "Field", cell: (r) => r.field }, { name: "A", cls: "mono", cell: (r) => r.a }, { name: "B", cls: "mono", cell: (r) => r.b }], report.recipe, 12, { hideCaption: true }) : bullets(["Equal but for the name and the place."])),
    report.gaps.length && card("Gaps", bullets(report.gaps)),
  ];
  section("compared", "compared-body", el("div", { class: "columns" }, said.filter(Boolean)));
  section("episodes", "browser", null);
}

function start() {
  theme();
  const comparison = report.kind === "comparison";
  (comparison ? comparePage : runPage)();
  section("pictures", "charts", [...data.charts.map((c) => curveChart(c, data.steps)), data.scatter && scatterChart(data.scatter)]);
  section("tables", "tables-body", data.tables.length ? el("div", { class: "stack" }, data.tables.map((t) => el("div", { class: "card" }, [
    paged(t.title, t.columns.map((name, i) => ({ name, num: t.rows.every((r) => typeof r[i] === "number"), cell: (r) => (typeof r[i] === "number" ? short(r[i]) : r[i] ?? "") })), t.rows, 16),
    t.note ? el("p", { class: "note" }, t.note) : null]))) : null);
  const weights = comparison
    ? [{ name: "Step", cell: (w) => whole(w.step) }, { name: "A", cls: "mono", cell: (w) => (w.a ?? "—").slice(0, 16) }, { name: "B", cls: "mono", cell: (w) => (w.b ?? "—").slice(0, 16) }, { name: "Same", cell: (w) => (w.a && w.b ? el("span", { class: w.a === w.b ? "good" : "bad" }, w.a === w.b ? "yes" : "no") : "—") }]
    : [{ name: "After step", cell: (w) => whole(w.step) }, { name: "Digest of the weights", cls: "mono", cell: (w) => w.digest }];
  section("run", "run-body", el("div", { class: "columns" }, [
    el("div", { class: "card" }, paged("Weights", weights, report.weights, 12)),
    el("div", { class: "stack" }, [
      el("div", { class: "card" }, data.machines.map((m) => paged(m.title, m.columns.map((name, i) => ({ name, cls: i ? "mono" : "", cell: (r) => r[i] })), m.rows, 40))),
      ...data.recipes.map(([name, text]) => el("div", { class: "card" }, drawer(name, () => el("pre", { tabindex: "0" }, text))))])]));
  document.documentElement.setAttribute("data-ready", "true");
}
start();
