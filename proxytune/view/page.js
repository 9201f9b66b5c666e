"use strict";
// Everything that a model or a prompt wrote is shown with textContent; nothing is parsed as HTML.

const $ = (id) => document.getElementById(id);
const STEERED = "combined";
const SIGNALS = ["gate", "fork", "drafted", "latent"];

function make(tag, attributes = {}, ...children) {
  const one = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") one.className = value;
    else if (name === "text") one.textContent = value;
    else if (name.startsWith("--")) one.style.setProperty(name, value);
    else if (value !== null) one.setAttribute(name, value);
  }
  one.append(...children);
  return one;
}

function draw(tag, attributes) {
  const one = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) one.setAttribute(name, value);
  return one;
}

// --- what was packed: see proxytune/view/packing.py -----------------------------------------------------------------

async function unpacked() {
  const signs = $("packed").textContent, digit = new Uint8Array(128);
  [..."ALPHABET"].forEach((sign, i) => { digit[sign.charCodeAt(0)] = i; });
  const groups = Math.ceil(signs.length / 5), bytes = new Uint8Array(4 * groups);
  for (let g = 0; g < groups; g++) {
    let value = 0;
    for (let i = 5 * g; i < 5 * g + 5; i++) value = 85 * value + (i < signs.length ? digit[signs.charCodeAt(i)] : 84);
    for (let i = 3; i >= 0; i--) { bytes[4 * g + i] = value % 256; value = Math.floor(value / 256); }
  }
  const whole = bytes.subarray(0, bytes.length - (5 * groups - signs.length));
  const stream = new Blob([whole]).stream().pipeThrough(new DecompressionStream("deflate"));
  const raw = new Uint8Array(await new Response(stream).arrayBuffer());
  const end = 4 + new DataView(raw.buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(raw.subarray(4, end)));
  return { ...head, ...columns(raw, end, head) };
}

function columns(raw, at, head) {
  const count = head.texts.reduce((sum, text) => sum + text.count, 0);
  const width = head.sources.length * head.top;
  function numbers(many, bytes) {
    const out = new Int32Array(many);
    for (let plane = 0; plane < bytes; plane++)
      for (let i = 0; i < many; i++) out[i] |= raw[at++] << (8 * plane);
    return out;
  }
  const ids = [];
  for (let column = 0; column <= width; column++) {
    const where = numbers(count, 1), fresh = numbers(where.reduce((n, one) => n + (one === 0), 0), 3);
    let next = 0;
    ids.push(where.map((one, i) => one === 255 ? -1 : one ? ids[one - 1][i] : fresh[next++]));
  }
  const levels = [];
  for (let column = 0; column < width; column++) {
    const kept = ids[column + 1], gaps = numbers(kept.reduce((n, one) => n + (one >= 0), 0), 2);
    const before = column % head.top ? levels[column - 1] : null;
    let next = 0;
    levels.push(kept.map((one, i) => one < 0 ? 0 : gaps[next++] + (before ? before[i] : 0)));
  }
  const nats = (level) => (level / head.numbersGrain) ** 2;
  const known = (read) => Array.from(numbers(count, 2), (level) => level === 0xFFFF ? NaN : read(level));
  const out = { ids, levels };
  out.logprobs = known((level) => -nats(level));
  out.entropy = known(nats);
  out.kl = known(nats);
  out.shift = known((level) => (level & 1 ? -1 : 1) * nats(level >> 1));
  out.rank = numbers(count, 2);
  for (const signal of SIGNALS) out[signal] = numbers(count, 1).map((one) => one - 1);
  return out;
}

// --- words -----------------------------------------------------------------------------------------------------------

const visible = (text) => text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f]/g, (sign) => {
  const code = sign.charCodeAt(0);
  return code < 0x20 ? String.fromCharCode(0x2400 + code) : code === 0x7f ? "\u2421" : "\ufffd";
});
const TURNS = /[\u200e\u200f\u202a-\u202e\u2066-\u2069]/;

function label(name) {
  if (name === "") return "(nothing)";
  if (!name.trim()) return [...name].map((one) => ({ "\n": "↵", "\t": "⇥", " ": "␣" })[one] || visible(one)).join("");
  return visible(name).replaceAll("\n", "↵").replaceAll("\t", "⇥").trim();
}

function share(logprob) {
  const percent = 100 * Math.exp(logprob);
  if (Number.isNaN(percent)) return "?";
  if (percent < 0.1) return "<0.1 %";
  return `${percent.toFixed(percent < 9.95 || (percent > 99 && percent < 99.95) ? 1 : 0)} %`;
}
const nats = (value) => Number.isNaN(value) ? "?" : value.toFixed(2);
const mean = (values) => values.reduce((sum, one) => sum + one, 0) / values.length;
const many = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const called = (source) => source === STEERED && run.sources.length > 2 ? "steered" : source;

// --- one text --------------------------------------------------------------------------------------------------------

let run, start, text, number = 0, at = 0, pinned = false, brush = null, colour = "";

const piece = (i) => text.pieces?.[i] ?? run.names[run.ids[0][start + i]];
const value = (name, i) => run[name][start + i];
const slice = (name) => run[name].slice(start, start + text.count);

/** What a source holds for likeliest at a position, best first: {token, level, logprob}. */
function likeliest(source, i) {
  const out = [];
  for (let r = 0; r < run.top; r++) {
    const column = source * run.top + r, token = run.ids[column + 1][start + i];
    if (token < 0) break;
    const level = run.levels[column][start + i];
    out.push({ token, level, logprob: -((level / run.grain) ** 2) });
  }
  return out;
}
const first = (source, i) => run.top ? run.ids[source * run.top + 1][start + i] : -1;
const knows = (signal) => slice(signal).some((one) => one >= 0);

function decided(i) {
  const mine = run.ids[0][start + i];
  const base = first(run.sources.indexOf("base"), i) === mine;
  const other = run.sources.some((source, s) =>
    source !== STEERED && source !== "base" && !source.startsWith("antiexpert") && first(s, i) === mine);
  return base ? (other ? "both" : "base") : other ? "expert" : "neither";
}

const marked = (signal, yes) => ({
  known: () => knows(signal), tone: () => "var(--yes)", amount: (i) => value(signal, i) === 1 ? 1 : 0, keys: [["var(--yes)", yes]],
});
const root = (value, most) => Math.sqrt(Math.min(value, most) / most);
const COLOURS = {
  kl: { name: "KL", known: () => run.sources.length > 2, tone: () => "var(--kl)",
    amount: (i) => root(value("kl", i), 2), scale: ["KL from the base, nats:", ...[0.1, 0.5, 1, 2].map((x) => [x, root(x, 2)])] },
  entropy: { name: "entropy", known: () => true, tone: () => "var(--entropy)",
    amount: (i) => root(value("entropy", i), 4), scale: ["entropy, nats:", ...[0.2, 1, 2, 4].map((x) => [x, root(x, 4)])] },
  probability: { name: "probability", known: () => true, tone: () => "var(--unlikely)",
    amount: (i) => 1 - Math.exp(value("logprobs", i)), scale: ["probability of the token:", ["75 %", 0.25], ["50 %", 0.5], ["25 %", 0.75], ["1 %", 0.99]] },
  decided: { name: "who decided", known: () => run.top > 0 && run.sources.length > 2 && run.sources.includes("base"),
    tone: (i) => `var(--${decided(i)})`, amount: (i) => decided(i) === "both" ? 0.35 : 1,
    keys: [["var(--base)", "first choice of the base alone"], ["var(--expert)", "of another member, not of the base"],
      ["var(--both)", "of both"], ["var(--neither)", "of neither"]] },
  drafted: { name: "accepted drafts", ...marked("drafted", "drafted and accepted") },
  fork: { name: "forks", ...marked("fork", "at a fork") },
  latent: { name: "latent", ...marked("latent", "a mixture was fed back") },
  gate: { name: "gate", ...marked("gate", "the gate was open") },
};

function show(to) {
  number = Math.min(Math.max(0, to), run.texts.length - 1);
  start = run.texts.slice(0, number).reduce((sum, one) => sum + one.count, 0);
  text = run.texts[number];
  at = 0;
  pinned = false;
  brush = null;
  $("heading").textContent = run.texts.length > 1 ? `Text ${number}` : "The text";
  $("facts").textContent = facts();
  for (const link of $("texts").children) {
    const here = link.dataset.text === String(number);
    here ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
    link.tabIndex = here ? 0 : -1;
    if (here) keepInView($("texts"), link);
  }
  hide();
  write();
  choices();
  chart();
  sides();
  strength();
}

/** Scroll a box, and nothing around it, so that one of its parts is seen. */
function keepInView(box, part) {
  const [outer, inner] = [box.getBoundingClientRect(), part.getBoundingClientRect()];
  if (inner.top < outer.top) box.scrollTop -= outer.top - inner.top;
  if (inner.bottom > outer.bottom) box.scrollTop += inner.bottom - outer.bottom;
}

function facts() {
  const told = [many(text.count, "token")];
  if (text.given) told.push("given, not generated");
  if (text.count && run.sources.length > 2) {
    told.push(`${slice("rank").filter((rank) => rank > 0).length} not the base's first choice`);
    told.push(`KL ${nats(mean(slice("kl")))} nats a token`);
  }
  if (text.count) told.push(`entropy ${nats(mean(slice("entropy")))} nats`);
  if (text.answer !== undefined) told.push(`answer: ${visible(String(text.answer))}`);
  if (text.grade !== undefined) told.push(`grade: ${text.grade}`);
  for (const [name, fact] of Object.entries(text.facts || {}))
    told.push(`${name}: ${visible(typeof fact === "string" ? fact : JSON.stringify(fact))}`);
  return told.join(" · ");
}

/** A token in a text of the page; `i` is its position. */
function span(i, shown, extra = "") {
  const token = make("span", { class: `token ${extra}` });
  token.dataset.i = i;
  if (shown === "") token.classList.add("empty");
  if (shown.includes("\n")) token.classList.add("line");
  if (TURNS.test(shown)) token.classList.add("turns");
  token.textContent = visible(shown);
  return token;
}

function write() {
  const box = $("text");
  box.setAttribute("aria-label", `${$("heading").textContent}, ${many(text.count, "token")}`);
  box.replaceChildren();
  if (text.prompt) box.append(make("span", { class: "prompt", text: visible(text.prompt) }));
  for (let i = 0; i < text.count; i++) {
    const token = span(i, piece(i), run.sources.length > 2 && value("rank", i) > 0 ? "changed" : "");
    if (value("fork", i) === 1) token.classList.add("fork");
    token.tabIndex = i ? -1 : 0;
    token.setAttribute("role", "button");
    token.setAttribute("aria-label", `${label(piece(i))}, token ${i + 1}`);
    box.append(token);
  }
}

const tokens = () => $("text").querySelectorAll(".token");

function choices() {
  const known = Object.keys(COLOURS).filter((name) => COLOURS[name].known());
  if (!known.includes(colour)) colour = known[0];
  const box = $("colours");
  box.replaceChildren(box.querySelector("legend"));
  for (const name of known) {
    const radio = make("input", { type: "radio", name: "colour", value: name });
    radio.checked = name === colour;
    box.append(make("label", {}, radio, ` ${COLOURS[name].name}`));
  }
  paint();
}

function paint() {
  const how = COLOURS[colour];
  tokens().forEach((token, i) => {
    const amount = how.amount(i);
    token.style.setProperty("--tone", how.tone(i));
    token.style.setProperty("--v", Number.isNaN(amount) ? 0 : amount);
  });
  const legend = $("legend");
  legend.replaceChildren();
  const swatch = (tone, amount, words) =>
    make("span", {}, make("span", { class: "swatch", "--tone": tone, "--v": amount }), words);
  if (how.scale) {
    const [words, ...steps] = how.scale;
    legend.append(words, ...steps.map(([name, amount]) => swatch(how.tone(0), amount, `${name}`)));
  }
  for (const [tone, words] of how.keys || []) legend.append(swatch(tone, words === "of both" ? 0.35 : 1, words));
  if (run.sources.length > 2)
    legend.append(make("span", {}, make("span", { class: "key-changed", text: "underlined" }), ": not the base's first choice"));
  if (knows("fork")) legend.append(make("span", { text: "◆ a fork" }));
}

// --- the current token, and what each source wanted there ------------------------------------------------------------

function go(to, { focus = true } = {}) {
  if (!text.count) return;
  const all = tokens();
  all[at].tabIndex = -1;
  at = Math.min(Math.max(0, to), text.count - 1);
  all[at].tabIndex = 0;
  if (focus) all[at].focus();
  pointOut();
  if (pinned) tip(at);
}

function pointOut() {
  document.querySelectorAll(".token.at").forEach((one) => one.classList.remove("at"));
  document.querySelectorAll(`.token[data-i="${at}"]`).forEach((one) => one.classList.add("at"));
  cursors();
}

function tip(i) {
  const box = $("tip"), anchor = tokens()[i], mine = run.ids[0][start + i];
  const told = [`probability ${share(value("logprobs", i))}`, `entropy ${nats(value("entropy", i))} nats`];
  if (run.sources.length > 2) {
    told.push(`KL ${nats(value("kl", i))} nats`, `shift ${value("shift", i) < 0 ? "−" : "+"}${nats(Math.abs(value("shift", i)))} nats`);
    told.push(value("rank", i) ? `the base's choice no. ${value("rank", i) + 1}` : "the base's first choice");
  }
  const words = { gate: ["gate shut", "gate open"], fork: [null, "a fork"], drafted: [null, "drafted, accepted"], latent: [null, "latent"] };
  for (const signal of SIGNALS) if (words[signal][value(signal, i)]) told.push(words[signal][value(signal, i)]);
  const sources = make("div", { class: "sources" });
  run.sources.forEach((source, s) => {
    const list = make("ol");
    for (const { token, logprob } of likeliest(s, i))
      list.append(make("li", { class: token === mine ? "chosen" : "", "--v": Math.exp(logprob) },
        make("span", { text: label(run.names[token]) }), make("span", { text: share(logprob) })));
    if (!list.children.length) list.append(make("li", { class: "quiet" }, make("span", { text: "nothing recorded" })));
    sources.append(make("div", {}, make("h3", { text: called(source) }), list));
  });
  box.replaceChildren(
    make("b", { text: label(piece(i)) }), ` token ${i + 1} of ${text.count}`,
    make("div", { class: "quiet", text: told.join(" · ") }), sources);
  box.classList.toggle("pinned", pinned);
  box.hidden = false;
  tokens().forEach((one) => one.removeAttribute("aria-describedby"));
  anchor.setAttribute("aria-describedby", "tip");
  const place = anchor.getClientRects()[0] || anchor.getBoundingClientRect(), room = document.documentElement.clientWidth;
  const left = Math.max(8, Math.min(place.left, room - box.offsetWidth - 8));
  const below = place.bottom + 8 + box.offsetHeight <= window.innerHeight || place.top < box.offsetHeight + 8;
  box.style.left = `${left + window.scrollX}px`;
  box.style.top = `${(below ? place.bottom + 8 : place.top - 8 - box.offsetHeight) + window.scrollY}px`;
}

function hide() {
  pinned = false;
  $("tip").hidden = true;
  if (text?.count) tokens()[at]?.removeAttribute("aria-describedby");
}

/** The token in the line above (−1) or below (1) that stands closest. */
function line(step) {
  const all = [...tokens()].map((one) => one.getClientRects()[0] || one.getBoundingClientRect()), here = all[at];
  const height = here.height / 2;
  const others = all.map((place, i) => [i, place]).filter(([, place]) => step * (place.top - here.top) > height);
  if (!others.length) return at;
  const next = step > 0 ? Math.min(...others.map(([, p]) => p.top)) : Math.max(...others.map(([, p]) => p.top));
  const inLine = others.filter(([, place]) => Math.abs(place.top - next) <= height);
  return inLine.reduce((best, one) => Math.abs(one[1].left - here.left) < Math.abs(best[1].left - here.left) ? one : best)[0];
}

const MOVES = {
  ArrowLeft: () => at - 1, ArrowRight: () => at + 1, ArrowUp: () => line(-1), ArrowDown: () => line(1),
  PageUp: () => at - 20, PageDown: () => at + 20, Home: () => 0, End: () => text.count - 1,
};

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Enter" || event.key === " ") {
    if (pinned) hide();
    else { pinned = true; tip(at); }
  } else if (MOVES[event.key]) {
    go(MOVES[event.key]());
  } else return;
  event.preventDefault();
}

// --- lines along the text --------------------------------------------------------------------------------------------

const HEIGHT = 100;

function chart() {
  const box = $("chart");
  box.replaceChildren();
  box.parentElement.hidden = !text.count;
  if (!text.count) return;
  const shown = [["entropy", "--entropy"], ...(run.sources.length > 2 ? [["kl", "--kl"]] : [])];
  shown.forEach(([name, tone], order) => {
    const values = slice(name).map((one) => Number.isNaN(one) ? 0 : one), most = values.reduce((a, b) => Math.max(a, b), 0.01);
    const points = values.map((one, i) => `${i + 0.5} ${(HEIGHT * (1 - 0.96 * one / most)).toFixed(1)}`).join(" L ");
    const svg = draw("svg", { viewBox: `0 0 ${text.count} ${HEIGHT}`, preserveAspectRatio: "none", role: "img",
      "aria-label": `${COLOURS[name].name} at each of ${many(text.count, "token")}, at most ${nats(most)} nats` });
    svg.style.setProperty("--tone", `var(${tone})`);
    svg.append(draw("path", { class: "area", d: `M 0.5 ${HEIGHT} L ${points} L ${text.count - 0.5} ${HEIGHT} Z` }),
      draw("path", { d: `M ${points}` }), draw("rect", { class: "brush", y: 0, height: HEIGHT, width: 0 }),
      draw("line", { class: "cursor", y1: 0, y2: HEIGHT }));
    const plot = make("div", { class: "plot" }, make("div", { class: "axis" },
      make("span", { text: name === "kl" ? "KL from the base" : "entropy" }), make("span", { text: `highest: ${nats(most)} nats` })), svg);
    if (!order) {
      plot.tabIndex = 0;
      plot.id = "brush";
      plot.setAttribute("role", "slider");
      plot.setAttribute("aria-label", "Place in the text; with Shift, a range of tokens");
      plot.setAttribute("aria-valuemin", 1);
      plot.setAttribute("aria-valuemax", text.count);
    }
    box.append(plot);
  });
  box.append(make("div", { class: "axis" }, make("span", { text: "token 1" }), make("span", { text: `token ${text.count}` })));
  select(null);
  pointOut();
}

function cursors() {
  document.querySelectorAll(".cursor").forEach((one) => { one.setAttribute("x1", at + 0.5); one.setAttribute("x2", at + 0.5); });
  const plot = $("brush");
  if (!plot) return;
  plot.setAttribute("aria-valuenow", at + 1);
  plot.setAttribute("aria-valuetext", `token ${at + 1}: ${label(piece(at))}, entropy ${nats(value("entropy", at))}, KL ${nats(value("kl", at))} nats`);
}

function select(range) {
  brush = range;
  const [from, to] = range ? [Math.min(...range), Math.max(...range)] : [0, -1];
  document.querySelectorAll(".brush").forEach((one) => { one.setAttribute("x", from); one.setAttribute("width", to - from + 1); });
  tokens().forEach((one, i) => one.classList.toggle("brushed", i >= from && i <= to));
  $("range").classList.toggle("screen", !range);
  if (!range) {
    $("range").textContent = "Drag over the lines, or press Shift and the arrow keys on them, to pick a range of tokens.";
    return;
  }
  const told = [`tokens ${from + 1} to ${to + 1}`, `entropy ${nats(mean(slice("entropy").slice(from, to + 1)))} nats`];
  if (run.sources.length > 2) {
    told.push(`KL ${nats(mean(slice("kl").slice(from, to + 1)))} nats a token`);
    told.push(`${slice("rank").slice(from, to + 1).filter((rank) => rank > 0).length} not the base's first choice`);
  }
  $("range").textContent = told.join(" · ");
}

function brushing() {
  let from = null;
  const place = (event) => {
    const box = $("chart").querySelector("svg").getBoundingClientRect();
    return Math.min(text.count - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * text.count)));
  };
  $("chart").addEventListener("pointerdown", (event) => {
    if (!event.target.closest("svg") || event.button) return;
    from = place(event);
    event.preventDefault();
    $("brush").focus();
    select(null);
    go(from, { focus: false });
  });
  window.addEventListener("pointermove", (event) => {
    if (from === null) return;
    const to = place(event);
    if (to !== from || brush) select([from, to]);
  });
  const end = () => {
    if (from !== null) keepInView($("text"), tokens()[brush ? Math.min(...brush) : at]);
    from = null;
  };
  window.addEventListener("pointerup", end);
  window.addEventListener("pointercancel", end);
  $("chart").addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, ArrowDown: at - 1, ArrowUp: at + 1, PageDown: at - 20, PageUp: at + 20,
      Home: 0, End: text.count - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const begin = brush ? brush[0] : at;
    go(to, { focus: false });
    if (event.shiftKey) select([begin, at]);
    keepInView($("text"), tokens()[at]);
  });
}

// --- side by side ----------------------------------------------------------------------------------------------------

function sides() {
  const shown = run.sources.map((source, s) => [source, s]).filter(([source]) => !source.startsWith("antiexpert"));
  shown.push(...shown.splice(0, 1));
  $("sides").hidden = shown.length < 3 || !text.count || !run.top;
  $("columns").replaceChildren();
  if ($("sides").hidden) return;
  for (const [source, s] of shown) {
    const words = make("div", { class: "reading" });
    let different = 0;
    for (let i = 0; i < text.count; i++) {
      const token = first(s, i), differs = token >= 0 && token !== run.ids[0][start + i];
      different += differs;
      words.append(span(i, token < 0 ? "·" : differs ? run.names[token] : piece(i), differs ? "differs" : ""));
    }
    const heading = make("h3", { text: `${called(source)} ` }, make("span", { class: "quiet", text: `${different} of ${text.count} differ` }));
    $("columns").append(make("div", {}, heading, words));
  }
}

// --- another alpha ---------------------------------------------------------------------------------------------------

/** Half the distance between two neighbouring levels: how far a log-probability may be off. */
const rounding = (level) => (level + 0.5) / run.grain ** 2;

/**
 * The greedy next token at position i, had alpha been r times what it was: {token, sure}.
 *
 * With base b and combined c = b + αd + constant, scores at rα are (1 − r)·b + r·c + constant. That is known of the
 * tokens in both lists. Of a token outside a list, the list's last bounds the score, if neither factor is negative.
 */
function greedy(i, r) {
  const b = likeliest(run.sources.indexOf("base"), i), c = likeliest(run.sources.indexOf(STEERED), i);
  if (r === 0 || r === 1) return { token: (r ? c : b)[0]?.token ?? -1, sure: true };
  if (!b.length || !c.length) return { token: -1, sure: false };
  const wanted = new Map(c.map((one) => [one.token, one.logprob])), last = (list) => list[list.length - 1];
  let best = { token: -1, score: -Infinity }, rival = (1 - r) * last(b).logprob + r * last(c).logprob;
  for (const { token, logprob } of b) {
    if (!wanted.has(token)) { rival = Math.max(rival, (1 - r) * logprob + r * last(c).logprob); continue; }
    const score = (1 - r) * logprob + r * wanted.get(token);
    if (score > best.score) { rival = Math.max(rival, best.score); best = { token, score }; }
    else rival = Math.max(rival, score);
    wanted.delete(token);
  }
  for (const logprob of wanted.values()) rival = Math.max(rival, (1 - r) * last(b).logprob + r * logprob);
  if (best.token < 0) return { token: (r < 0.5 ? b : c)[0].token, sure: false };
  const margin = 2 * (Math.abs(1 - r) * rounding(last(b).level) + r * rounding(last(c).level));
  return { token: best.token, sure: r < 1 && best.score > rival + margin };
}

function strength() {
  $("strength").hidden = !(run.alpha > 0) || !run.top || !text.count || !run.sources.includes("base");
  if ($("strength").hidden) return;
  const slider = $("alpha");
  Object.assign(slider, { min: 0, max: 2 * run.alpha, step: run.alpha / 20 });
  slider.value = run.alpha;
  $("alpha-note").textContent = `The greedy next token at each position of the recorded text, had α been another; the text before it stays as `
    + `it was recorded. It is worked out from the likeliest tokens of the base and of the steered model at α = ${run.alpha}, whose scores are a `
    + `straight line in α. Up to α = ${run.alpha} a token is certain unless it is dashed: there, a token outside the lists might win. Beyond `
    + `α = ${run.alpha} nothing is certain.`;
  restrength();
}

function restrength() {
  const alpha = Number($("alpha").value), twentieth = Math.round(20 * alpha / run.alpha) / 20, words = $("alpha-text");
  $("alpha-value").textContent = `${Number((twentieth * run.alpha).toFixed(4))}`;
  words.replaceChildren();
  let different = 0, unsure = 0;
  for (let i = 0; i < text.count; i++) {
    const { token, sure } = greedy(i, twentieth), differs = token !== greedy(i, 1).token;
    different += differs;
    unsure += !sure;
    words.append(span(i, token < 0 ? "?" : token === run.ids[0][start + i] ? piece(i) : run.names[token],
      `${differs ? "differs" : ""} ${sure ? "" : "unsure"}`));
  }
  $("alpha-summary").textContent = `${different} of ${text.count} greedy tokens differ from those at α = ${run.alpha}; ${text.count - unsure} are certain.`;
}

// --- fork trees ------------------------------------------------------------------------------------------------------

function trees() {
  $("trees").hidden = !run.trees.length;
  for (const tree of run.trees) $("trees").append(make("div", { class: "tree" }, node(tree)));
}

function node(one) {
  const told = [];
  if (typeof one.weight === "number") told.push(`weight ${one.weight.toFixed(3)}`);
  if (typeof one.entropy === "number") told.push(`entropy ${nats(one.entropy)} nats`);
  if (typeof one.tokens === "number") told.push(many(one.tokens, "token"));
  if (one.leaf !== undefined && one.leaf !== null) told.push(`leaf ${one.leaf}`);
  if (one.finished === false) told.push("cut");
  const head = [make("span", { class: "words", text: visible(String(one.text ?? "")) }), " ", make("span", { class: "quiet", text: told.join(" · ") })];
  if (typeof one.weight === "number") head.unshift(make("span", { class: "weight", "--v": Math.min(1, Math.max(0, one.weight)) }));
  if (!one.children?.length) return make("div", { class: "leaf" }, ...head);
  const box = make("details", {}, make("summary", {}, ...head), ...one.children.map(node));
  box.open = true;
  return box;
}

// --- the page --------------------------------------------------------------------------------------------------------

/** The first and the last letters of a text, on one line. */
function cut(words, head, tail) {
  const letters = [...label(words)];
  if (letters.length <= head + tail) return letters.join("");
  return `${letters.slice(0, head).join("").trimEnd()}…${letters.slice(-tail).join("").trimStart()}`;
}

/** How many letters all prompts end in, from a space on: those of a template, by which no prompt is told. */
function alike(prompts) {
  const [one] = prompts, last = (words, n) => words[words.length - 1 - n];
  let n = 0;
  while (n < one.length && prompts.every((words) => last(words, n) === last(one, n))) n++;
  const space = one.slice(one.length - n).search(/\s/);
  return space < 0 ? 0 : n - space;
}

function list() {
  const prompts = [...new Set(run.texts.map((one) => one.prompt).filter(Boolean))], template = prompts.length > 1 ? alike(prompts) : 0;
  let from = 0;
  run.texts.forEach((one, i) => {
    const words = [...Array(one.count).keys()].map((j) => one.pieces?.[j] ?? run.names[run.ids[0][from + j]]).join("");
    const told = [many(one.count, "token")];
    if (one.answer !== undefined) told.push(`answer ${cut(String(one.answer), 20, 10)}`);
    if (one.grade !== undefined) told.push(`grade ${one.grade}`);
    if (run.sources.length > 2 && one.count) told.push(`KL ${nats(mean(run.kl.slice(from, from + one.count)))}`);
    const link = make("a", { href: `#text=${i}`, tabindex: -1 }, make("b", { text: `${i} ${cut(words, 24, 24)}` }));
    if (prompts.length > 1 && one.prompt) link.append(make("div", { class: "quiet", text: cut(one.prompt.slice(0, one.prompt.length - template), 0, 36) }));
    link.append(make("span", { class: "quiet", text: told.join(" · ") }));
    link.dataset.text = i;
    $("texts").append(link);
    from += one.count;
  });
  $("texts").hidden = run.texts.length < 2;
  $("page").classList.toggle("single", run.texts.length < 2);
  $("texts").addEventListener("keydown", (event) => {
    const links = [...$("texts").children], here = links.indexOf(document.activeElement);
    const to = { ArrowUp: here - 1, ArrowDown: here + 1, Home: 0, End: links.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    links[Math.min(Math.max(0, to), links.length - 1)].focus();
  });
}

/** `#text=3&colour=entropy&theme=dark&token=7&alpha=0.2`: where a link leads. */
function follow() {
  const asked = new URLSearchParams(location.hash.slice(1));
  if (asked.has("theme")) theme(asked.get("theme"));
  if (asked.has("colour")) colour = asked.get("colour");
  show(Number(asked.get("text")) || 0);
  if (asked.has("alpha") && !$("strength").hidden) { $("alpha").value = asked.get("alpha"); restrength(); }
  if (asked.has("token")) { go((Number(asked.get("token")) || 1) - 1, { focus: false }); pinned = true; tip(at); }
}

function theme(name) {
  $("theme").value = ["light", "dark"].includes(name) ? name : "";
  document.documentElement.style.colorScheme = $("theme").value || "";
}

function listen() {
  window.addEventListener("hashchange", follow);
  const again = () => { if (pinned) tip(at); else hide(); };
  window.addEventListener("resize", again);
  $("text").addEventListener("scroll", again);
  $("theme").addEventListener("change", () => theme($("theme").value));
  $("colours").addEventListener("change", (event) => { colour = event.target.value; paint(); });
  $("alpha").addEventListener("input", restrength);
  $("text").addEventListener("keydown", keys);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if ($("tip").hidden) select(null);
    else hide();
  });
  const of = (event) => event.target.closest?.(".token");
  $("text").addEventListener("pointerover", (event) => { const one = of(event); if (one && !pinned && event.pointerType !== "touch") tip(Number(one.dataset.i)); });
  $("text").addEventListener("pointerleave", () => { if (!pinned) hide(); });
  $("text").addEventListener("focusin", (event) => { const one = of(event); if (one && Number(one.dataset.i) !== at) go(Number(one.dataset.i), { focus: false }); });
  document.addEventListener("click", (event) => {
    const one = of(event);
    if (one) {
      const same = pinned && Number(one.dataset.i) === at;
      go(Number(one.dataset.i), { focus: Boolean(one.closest("#text")) });
      if (!one.closest("#text")) return;
      if (same) hide();
      else { pinned = true; tip(at); }
    } else if (pinned && !event.target.closest?.("#tip")) hide();
  });
  brushing();
}

function tellRun() {
  document.title = $("title").textContent = run.title;
  const told = [];
  for (const [name, fact] of Object.entries(run.about)) {
    if (name === "members" && fact && typeof fact === "object")
      told.push(Object.entries(fact).map(([role, model]) => `${role}: ${String(model).replace(/.*[/\\]/, "")}`).join(" · "));
    else if (name !== "model") told.push(`${name}: ${typeof fact === "string" ? fact : JSON.stringify(fact)}`);
  }
  $("about").textContent = visible(told.join(" · "));
  const kept = [`The ${run.top} likeliest tokens of each source are shown`];
  if (run.least) kept.push(`those below ${Number((100 * run.least).toPrecision(2))} % are left out, and probabilities are rounded, to keep this page small`);
  $("precision").textContent = `${kept.join("; ")}. Distributions are those of the raw logits at temperature 1.`;
}

async function begin() {
  try {
    run = await unpacked();
    $("page").hidden = false;
    tellRun();
    list();
    trees();
    listen();
    follow();
    document.documentElement.dataset.ready = "yes";
  } catch (problem) {
    $("problem").hidden = false;
    $("problem").textContent = `This page cannot be shown: ${problem.message}. A browser from 2024 or later is needed.`;
    document.documentElement.dataset.ready = "no";
    throw problem;
  }
}

begin();
