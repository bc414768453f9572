// Elements, numbers and tables. Text is set as text, never as HTML: what comes from a run is hostile.

const SVG = "http://www.w3.org/2000/svg";

function put(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of [children].flat(2)) if (child !== null && child !== undefined) node.append(child);
  return node;
}
const el = (name, attributes, children) => put(document.createElement(name), attributes, children);
const svg = (name, attributes, children) => put(document.createElementNS(SVG, name), attributes, children);
const byId = (id) => document.getElementById(id);
const plural = (n, one) => `${whole(n)} ${one}${n === 1 ? "" : "s"}`;
const whole = (n) => (n === null ? "—" : Number(n).toLocaleString("en-US"));
const signed = (n) => (n === null ? "—" : (n > 0 ? "+" : n < 0 ? "−" : "") + Math.abs(n).toFixed(2));

function short(n) {
  if (n === null || n === undefined) return "—";
  if (n === 0) return "0";
  const size = Math.abs(n);
  if (size >= 1e5 || size < 1e-3) return n.toExponential(2);
  return size >= 100 ? n.toFixed(0) : String(Number(n.toPrecision(3)));
}

// columns: [{name, num, cls, cell(row) -> text or node}]
function table(caption, columns, rows, options = {}) {
  const head = el("tr", {}, columns.map((c) => el("th", { scope: "col", class: classes(c) }, c.name)));
  const body = el("tbody", {}, rows.map((row, i) => {
    const cells = columns.map((c, j) => el(j === 0 && !options.plain ? "th" : "td", { class: classes(c), scope: j === 0 && !options.plain ? "row" : null }, c.cell(row)));
    return el("tr", options.row ? options.row(row, i) : {}, cells);
  }));
  return el("div", { class: "scroll" }, el("table", { class: options.cls || "" }, [
    el("caption", { class: options.hideCaption ? "skip" : "" }, caption), el("thead", {}, head), body]));
}
const classes = (c) => [c.num ? "num" : "", c.cls || ""].join(" ").trim() || null;

// A table a page at a time: ten thousand rows are looked up, not scrolled.
function paged(caption, columns, rows, size, options = {}) {
  const box = el("div", {});
  let first = options.first || 0;
  const draw = (focus) => {
    const last = Math.min(first + size, rows.length);
    const turn = (text, to, enabled) => el("button", { type: "button", disabled: !enabled, onclick: () => { first = to; draw(text); } }, text);
    const previous = turn("Previous", Math.max(0, first - size), first > 0);
    const next = turn("Next", first + size, last < rows.length);
    box.replaceChildren(
      rows.length ? table(caption, columns, rows.slice(first, last), options) : el("p", { class: "note" }, "Nothing matches."),
      rows.length > size ? el("div", { class: "pager" }, [
        el("span", { role: "status" }, `${whole(first + 1)}–${whole(last)} of ${whole(rows.length)}`), el("div", {}, [previous, next])]) : "");
    if (focus) (focus === "Next" && !next.disabled ? next : previous.disabled ? next : previous).focus();
  };
  draw();
  return box;
}

// A closed drawer whose content is made when it is first opened.
function drawer(title, make) {
  const box = el("details", {}, el("summary", {}, title));
  box.addEventListener("toggle", () => { if (box.open && box.children.length === 1) box.append(make()); });
  return box;
}
