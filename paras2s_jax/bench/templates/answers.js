// All answers: rows come from the page's JSON and are drawn a page at a time, so that a bench of
// many thousand answers stays light. Text from models only ever goes into text nodes.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const data = read("answer-data");
const lazily = (id) => { let value; return () => (value ??= read(id)); };
const rawData = lazily("raw-data");
const soundData = lazily("sound-data");

const answers = data.rows.map((row, index) => ({
  ...row,
  index,
  system: data.systems[row.system],
  query: data.queries[row.query],
}));
const COLUMNS = [
  { title: "System", kind: "text", value: (a) => a.system },
  { title: "Score", value: (a) => a.score },
  { title: "Dimension", kind: "text", value: (a) => a.query.dimension, minor: true },
  { title: "Style", kind: "text", value: (a) => a.query.style },
  { title: "Voice", kind: "text", value: (a) => a.query.voice, minor: true },
  { title: "Query", kind: "text", value: (a) => a.query.text, wide: true },
  { title: "Answer as heard", kind: "text", value: (a) => a.heard || a.says, wide: true },
  { title: "Tone", kind: "text", value: (a) => a.tone, minor: true },
  { title: "Swap gain", value: (a) => a.gain, minor: true },
];

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== ""));
  return made;
}

const fixed = (value, digits = 2) => (value === null ? "n/a" : value.toFixed(digits));
const signed = (value) => (value === null ? "n/a" : `${value < 0 ? "" : "+"}${value.toFixed(2)}`);

function scoreMark(score) {
  if (score === null) return element("span", { class: "score none" }, "not scored");
  return element("span", { class: `score s${Math.min(5, Math.max(1, Math.round(score)))}` }, fixed(score, 1));
}

function player(sound, label) {
  const held = document.querySelector(`audio[data-sound="${CSS.escape(sound)}"]`);
  const source = held ? held.getAttribute("src") : soundData()[sound];
  const audio = element("audio", { controls: true, preload: "none", "aria-label": label, src: source });
  audio.addEventListener("error", () => {
    audio.replaceWith(element("p", { class: "wrong" }, `The recording is not at ${source.slice(0, 200)}; it lies in the folder of the bench.`));
  });
  return audio;
}

function facts(pairs) {
  const list = element("dl", { class: "facts" });
  for (const [name, value] of pairs) {
    if (value === null || value === "") continue;
    list.append(element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  }
  return list;
}

function heardStyle(answer) {
  if (answer.styleHeard === null) return "given, not heard";
  const right = answer.styleHeard === answer.query.style;
  return element("span", { class: right ? "right" : "wrong" }, answer.styleHeard || "no style");
}

function querySide(answer) {
  const { query } = answer;
  return element("div", { class: "query" },
    element("h4", {}, "Query, spoken as ", element("em", {}, query.style)),
    player(query.sound, `Query, ${query.style}: ${query.text}`),
    element("p", {}, query.text),
    facts([
      ["words heard", answer.queryHeard || "(none)"],
      ["style heard", heardStyle(answer)],
      ["other style", query.contrast],
      ["voice", query.voice],
      ["topic", query.topic],
      ["id", query.id],
    ]));
}

function answerSide(answer) {
  const failed = answer.status === "ok" ? null : element("span", { class: "wrong" }, answer.status);
  const repeats = answer.repeats.map((part) => (part === null ? "failed" : fixed(part, 1))).join(", ");
  return element("div", { class: "answer" },
    element("h4", {}, `Answer of ${answer.system}`, answer.sample ? `, sample ${answer.sample + 1}` : ""),
    answer.sound ? player(answer.sound, `Answer of ${answer.system} to the ${answer.query.style} query: ${answer.says || answer.heard}`) : null,
    facts([
      ["meant to say", answer.says],
      ["words heard", answer.heard || "(none)"],
      ["tone heard", answer.tone || "(none)"],
      ["independent ear", answer.ear === null ? null : element("span", { class: answer.earHit ? "right" : "wrong" }, answer.ear)],
      ["length", answer.cut ? element("span", { class: "wrong" }, "cut off at the length limit") : null],
      ["score", scoreMark(answer.score)],
      ["failed", failed],
      ["repeats", repeats],
      ["words fit", answer.content === null ? null : fixed(answer.content)],
      ["tone fits", answer.toneFit === null ? null : fixed(answer.toneFit)],
      ["in the other style", answer.swapped === null ? null : `${fixed(answer.swapped, 1)} (swap gain ${signed(answer.gain)})`],
      ["reason", answer.reason],
    ]));
}

function detail(answer) {
  const raw = element("details", { class: "raw" }, element("summary", {}, "Raw replies of every stage"));
  raw.addEventListener("toggle", () => {
    if (raw.open && raw.childElementCount === 1) {
      raw.append(element("pre", { tabindex: "0", role: "region", "aria-label": "Raw replies" }, JSON.stringify(rawData()[answer.index], null, 1)));
    }
  }, { once: true });
  return element("div", { class: "detail" }, element("div", { class: "takes" }, querySide(answer), answerSide(answer)), raw);
}

// What is shown: the filtered rows in their order, one page of them.
const table = document.getElementById("answer-table");
const form = document.getElementById("answer-filters");
const pager = document.getElementById("answer-pager");
const rowsPerPage = document.getElementById("answer-rows");
const state = { found: answers, sort: null, page: 0 };

function drawRow(answer) {
  const cells = COLUMNS.map((column, index) => {
    const classes = [column.minor && "minor", column.wide && "words"].filter(Boolean).join(" ") || null;
    if (index === 0) {
      const toggle = element("button", { type: "button", "aria-expanded": "false", "aria-label": `Details of ${answer.system}, ${answer.query.style}: ${answer.query.text}` }, answer.system);
      return element("th", { scope: "row" }, toggle);
    }
    if (column.title === "Score") return element("td", { class: classes }, scoreMark(answer.score));
    if (column.title === "Swap gain") return element("td", { class: classes }, signed(answer.gain));
    return element("td", { class: `text ${classes ?? ""}`.trim() }, String(column.value(answer) || "–"));
  });
  const row = element("tr", { class: "answer-row" }, ...cells);
  row.answer = answer;
  return row;
}

function toggleRow(row) {
  const button = row.querySelector("button");
  const open = button.getAttribute("aria-expanded") === "true";
  button.setAttribute("aria-expanded", String(!open));
  if (open) row.nextElementSibling.remove();
  else row.after(element("tr", { class: "detail-row" }, element("td", { colspan: COLUMNS.length }, detail(row.answer))));
}

function histogram(found) {
  const counts = [1, 2, 3, 4, 5].map((score) => found.filter((a) => a.score !== null && Math.min(5, Math.max(1, Math.round(a.score))) === score).length);
  const most = Math.max(1, ...counts);
  const list = element("ol", { "aria-label": "Number of answers by score" });
  counts.forEach((count, index) => {
    const bar = element("span", { class: `fill s${index + 1}` });
    bar.style.height = `${Math.max(count ? 2 : 0, Math.round(36 * count / most))}px`;
    list.append(element("li", {}, element("span", { class: "quiet" }, count.toLocaleString("en")), bar, element("b", {}, element("span", { class: "hidden" }, "score "), String(index + 1))));
  });
  document.getElementById("answer-histogram").replaceChildren(list);
}

function draw() {
  const { found } = state;
  const size = Number(rowsPerPage.value);
  const last = Math.max(0, Math.ceil(found.length / size) - 1);
  state.page = Math.min(Math.max(state.page, 0), last);
  const start = state.page * size;
  const ordered = state.sort ? orderBy(found, COLUMNS[state.sort.index].value, state.sort.direction) : found;
  table.tBodies[0].replaceChildren(...ordered.slice(start, start + size).map(drawRow));
  document.getElementById("answer-page").textContent = found.length
    ? `${(start + 1).toLocaleString("en")} to ${Math.min(start + size, found.length).toLocaleString("en")} of ${found.length.toLocaleString("en")}`
    : "no answer";
  for (const button of pager.querySelectorAll("button")) {
    const back = ["first", "previous"].includes(button.dataset.go);
    // Not `disabled`, which would take the focus away from who pages by keyboard.
    button.setAttribute("aria-disabled", String(back ? state.page === 0 : state.page === last));
  }
}

function filter() {
  const wanted = Object.fromEntries(new FormData(form));
  const low = Number(wanted.low || 1), high = Number(wanted.high || 5);
  const whole = low <= 1 && high >= 5;
  const words = wanted.words.trim().toLowerCase();
  const fits = (a) =>
    (!wanted.system || a.system === wanted.system) &&
    (!wanted.dimension || a.query.dimension === wanted.dimension) &&
    (!wanted.style || a.query.style === wanted.style) &&
    (!wanted.voice || a.query.voice === wanted.voice) &&
    (wanted.verdict !== "scored" || a.score !== null) &&
    (wanted.verdict !== "failed" || a.score === null) &&
    (wanted.verdict !== "deaf" || (a.gain !== null && a.gain <= 0)) &&
    (whole || (a.score !== null && a.score >= low && a.score <= high)) &&
    (!words || [a.query.text, a.heard, a.says, a.reason, a.status].some((text) => text.toLowerCase().includes(words)));
  state.found = answers.filter(fits);
  state.page = 0;
  const scored = state.found.filter((a) => a.score !== null);
  const failed = state.found.length - scored.length;
  const mean = scored.length ? scored.reduce((sum, a) => sum + a.score, 0) / scored.length : null;
  const noun = state.found.length === 1 ? "answer" : "answers";
  document.getElementById("answer-count").textContent =
    `${state.found.length.toLocaleString("en")} ${noun}, ${failed.toLocaleString("en")} not scored, mean score ${fixed(mean)}`;
  histogram(state.found);
  draw();
}

for (const column of COLUMNS) {
  const classes = column.minor ? "minor" : null;
  table.tHead.rows[0].append(element("th", { scope: "col", class: classes, "data-kind": column.kind ?? null }, column.title));
}
makeSortable([...table.tHead.rows[0].cells], (index, direction) => {
  Object.assign(state, { sort: { index, direction }, page: 0 });
  draw();
});
for (const [name, value] of [["system", (a) => a.system], ["dimension", (a) => a.query.dimension], ["style", (a) => a.query.style], ["voice", (a) => a.query.voice]]) {
  const values = [...new Set(answers.map(value))].sort(collator.compare);
  form.elements[name].append(...values.map((text) => element("option", { value: text }, text)));
}
table.tBodies[0].addEventListener("click", (event) => {
  const row = event.target.closest(".answer-row");
  // A click anywhere opens a row, unless it ends the marking of text.
  if (row && (event.target.closest("button") || String(getSelection()) === "")) toggleRow(row);
});
table.tBodies[0].addEventListener("keydown", (event) => {
  const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!move || !event.target.matches(".answer-row button")) return;
  event.preventDefault();
  const buttons = [...table.querySelectorAll(".answer-row button")];
  buttons[buttons.indexOf(event.target) + move]?.focus();
});
pager.addEventListener("click", (event) => {
  const go = event.target.closest("button")?.dataset.go;
  if (!go || event.target.getAttribute("aria-disabled") === "true") return;
  state.page = { first: 0, previous: state.page - 1, next: state.page + 1, last: Infinity }[go];
  draw();
});
rowsPerPage.addEventListener("change", () => { state.page = 0; draw(); });
form.addEventListener("input", filter);
form.addEventListener("reset", () => setTimeout(filter));
form.addEventListener("submit", (event) => event.preventDefault());
form.hidden = pager.hidden = false;
filter();
