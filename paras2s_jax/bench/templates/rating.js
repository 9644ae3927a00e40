"use strict";
// State of one rater: ratings by item key, the place in their own order. It lives in localStorage,
// under the page's identity and the rater's name, after every change.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const PREFIX = `paras2s-rating:${data.id}:`;
const LAST = `paras2s-rater:${data.id}`;
const GAP_MS = 400;
let rater = "", order = [], ratings = {}, at = 0, heard = new Set();

const storage = {
  read(key) { try { return localStorage.getItem(key); } catch { return null; } },
  write(key, value) {
    try {
      localStorage.setItem(key, value);
    } catch {
      say("This browser keeps nothing: export your ratings before you close the page.");
    }
  },
};

function say(text) { byId("message").textContent = text; }

// Orders differ between raters and stay the same for one: numbers from a hash of page and name.
function randomOf(text) {
  let hash = 2166136261;
  for (const char of text) hash = Math.imul(hash ^ char.codePointAt(0), 16777619);
  return () => {
    hash = (hash + 0x6d2b79f5) | 0;
    let t = Math.imul(hash ^ (hash >>> 15), 1 | hash);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

function shuffled(count, text) {
  const random = randomOf(text), places = [...Array(count).keys()];
  for (let i = count - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [places[i], places[j]] = [places[j], places[i]];
  }
  return places;
}

const stored = (name) => JSON.parse(storage.read(PREFIX + name) ?? "{}");
const numRated = (found) => data.items.filter((item) => item.key in found).length;
const item = () => data.items[order[at]];

// Playing. A pair can be scored once both of its recordings were heard to their ends.
const voices = Object.fromEntries(["query", "answer"].map((part) => {
  const button = byId(`play-${part}`), audio = new Audio();
  const voice = { part, button, audio };
  audio.preload = "auto";
  const show = () => {
    const playing = !audio.paused && !audio.ended;
    button.classList.toggle("playing", playing);
    button.setAttribute("aria-label", `${playing ? "Stop" : "Play"} the ${part}`);
  };
  audio.addEventListener("play", show);
  audio.addEventListener("pause", show);
  audio.addEventListener("timeupdate", () => {
    button.querySelector(".rail span").style.width = `${100 * audio.currentTime / (audio.duration || 1)}%`;
  });
  audio.addEventListener("ended", () => { heard.add(part); show(); draw(); });
  audio.addEventListener("error", () => say(`The recording of the ${part} cannot be played; go on to the next pair.`));
  button.addEventListener("click", () => (audio.paused ? play(voice) : stop()));
  show();
  return [part, voice];
}));
let queued = 0;

function stop() {
  clearTimeout(queued);
  for (const { audio } of Object.values(voices)) {
    audio.onended = null;
    audio.pause();
  }
}

function play({ audio }) {
  stop();
  audio.currentTime = 0;
  // Broken recordings are reported by their error event, stopped ones need no report.
  audio.play().catch(() => {});
}

function playBoth() {
  play(voices.query);
  voices.query.audio.onended = () => { queued = setTimeout(() => play(voices.answer), GAP_MS); };
}

const isPlaying = () => Object.values(voices).some(({ audio }) => !audio.paused && !audio.ended);

// Showing, moving, scoring.
function draw() {
  const score = ratings[item().key], open = score !== undefined || heard.size === 2;
  const done = numRated(ratings), total = data.items.length;
  byId("pair").textContent = `Pair ${at + 1} of ${total}`;
  byId("rated").textContent = `${done} of ${total} rated`;
  byId("progress").setAttribute("aria-valuenow", done);
  byId("progress").firstElementChild.style.width = `${100 * done / total}%`;
  for (const { part, button } of Object.values(voices)) {
    button.classList.toggle("heard", heard.has(part) || score !== undefined);
  }
  for (const button of document.querySelectorAll(".level")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.score) === score));
    button.setAttribute("aria-disabled", String(!open));
  }
}

function show(place, message = "") {
  stop();
  at = Math.min(Math.max(place, 0), order.length - 1);
  heard = new Set();
  for (const { part, audio, button } of Object.values(voices)) {
    audio.src = data.sounds[item()[part]];
    button.querySelector(".rail span").style.width = "0";
  }
  say(message);
  draw();
  byId("pair").focus({ preventScroll: true });
}

function nextUnrated() {
  const places = order.map((_, step) => (at + 1 + step) % order.length);
  return places.find((place) => !(data.items[order[place]].key in ratings));
}

function rate(score) {
  if (ratings[item().key] === undefined && heard.size < 2) {
    say("Listen to the query and to the answer first: space plays both.");
    return;
  }
  ratings[item().key] = score;
  storage.write(PREFIX + rater, JSON.stringify(ratings));
  const next = nextUnrated();
  if (next === undefined) {
    draw();
    say(`All ${data.items.length} pairs are rated, thank you. Export the ratings and send the file to whoever asked you.`);
    byId("export").classList.add("primary");
  } else if (byId("go-on").checked) {
    show(next, `Pair ${at + 1} has a ${score}.`);
  } else {
    draw();
    say(`Scored ${score}.`);
  }
}

// Export: one line per rating, in the order of the page.
function decoded(key) {
  return JSON.parse(new TextDecoder().decode(Uint8Array.from(atob(key), (char) => char.charCodeAt(0))));
}

const quoted = (value) => (/[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value));

function exportCsv() {
  const lines = [data.columns];
  for (const { key } of data.items) {
    if (key in ratings) lines.push([rater, ...decoded(key), ratings[key]]);
  }
  if (lines.length === 1) {
    say("There is nothing to export yet.");
    return;
  }
  const text = lines.map((line) => line.map(quoted).join(",")).join("\n") + "\n";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = `ratings-${rater.replace(/[^\p{L}\p{N}_-]+/gu, "-")}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  say(`Exported ${lines.length - 1} ratings.`);
}

// Starting, and going on where a rater stopped.
function announce() {
  const name = byId("rater").value.trim(), done = name ? numRated(stored(name)) : 0;
  byId("known").textContent = done ? `${name} has rated ${done} of ${data.items.length} pairs in this browser.` : "";
  byId("begin").textContent = done ? "Continue" : "Start";
}

function turnTo(part) {
  for (const id of ["welcome", "rating"]) byId(id).hidden = id !== part;
}

byId("start").addEventListener("submit", (event) => {
  event.preventDefault();
  rater = byId("rater").value.trim();
  if (!rater) {
    byId("rater").value = "";
    byId("rater").reportValidity();
    return;
  }
  storage.write(LAST, rater);
  ratings = stored(rater);
  order = shuffled(data.items.length, data.id + rater);
  turnTo("rating");
  at = -1;
  show(nextUnrated() ?? 0);
});
byId("rater").addEventListener("input", announce);
byId("previous").addEventListener("click", () => show(at - 1));
byId("next").addEventListener("click", () => show(at + 1));
byId("unrated").addEventListener("click", () => show(nextUnrated() ?? at));
byId("export").addEventListener("click", exportCsv);
byId("pause").addEventListener("click", () => {
  stop();
  turnTo("welcome");
  announce();
  byId("begin").focus();
});
for (const button of document.querySelectorAll(".level")) {
  button.addEventListener("click", () => rate(Number(button.dataset.score)));
}
document.addEventListener("keydown", (event) => {
  if (byId("rating").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
  if (!byId("shortcuts").checked) return;
  // Space belongs to the button that has the focus.
  if (event.key === " " && event.target.closest("button, input")) return;
  const does = {
    " ": () => (isPlaying() ? stop() : playBoth()),
    q: () => play(voices.query),
    a: () => play(voices.answer),
    ArrowLeft: () => show(at - 1),
    ArrowRight: () => show(at + 1),
  }[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (does) does();
  else if (/^[1-5]$/.test(event.key)) rate(Number(event.key));
  else return;
  event.preventDefault();
});
byId("rater").value = storage.read(LAST) ?? "";
announce();
