import { Stage } from "./canvas.js";
import { Classes } from "./classes.js";
import { change, get, maps, post } from "./server.js";
import { Strip } from "./strip.js";
import { Tools } from "./tools.js";

const $ = (id) => document.getElementById(id);
const POLL = 2500; // milliseconds between looks at a session whose photos are being measured

let state = null; // of the session, from /state
let learning = false;
let again = false; // a stroke arrived while the network learned

const stage = new Stage($("canvas"));
const strip = new Strip($("strip"), $("strip-inner"), (number) => open(number));
const tools = new Tools(stage, $("stage"), {
  paint,
  label() {
    if (classes.label !== null) return classes.label;
    showHint();
    $("new-name").focus();
    return undefined;
  },
  complain: showError,
});
const classes = new Classes(async (content) => {
  try {
    await change("classes", content);
    await refresh();
    showError("");
    if (content.action !== "change") showMask(); // of other classes; nobody waits for it
    return true;
  } catch (error) {
    showError(error.message);
    return false;
  }
}, () => stage.draw());

function showError(message) {
  $("error").textContent = message || "";
  $("error").hidden = !message;
}

function showHint() {
  const { photo } = stage;
  let hint = "";
  if (state && !state.photos) hint = "There are no photos.";
  else if (state && state.classes.length < 2) {
    hint = state.classes.length ? "Name a second class, such as background." : "Name what you want to find: two classes or more, on the right.";
  } else if (photo && state.painted.length < 2) {
    const missing = state.classes.filter(({ label }) => !state.painted.includes(label)).map(({ name }) => name);
    hint = `Paint a little of ${missing.slice(0, 3).join(" and of ")}. A stroke or two of each is enough to begin.`;
  }
  $("hint").textContent = hint;
}

// The session

async function refresh() {
  state = await get("state");
  stage.tile = state.tile;
  classes.show(state.classes, state.suggestions);
  stage.colours = classes.colours;
  strip.show(state);
  if (stage.mask) stage.showMask(stage.mask.maps);
  const measured = state.measured < state.photos ? ` · ${state.measured} analysed` : "";
  $("progress").textContent = `${state.accepted.length} accepted, ${state.begun.length} begun of ${state.photos}${measured}`;
  $("folder").textContent = state.folder;
  $("command").textContent = state.train;
  const unused = state.classes.filter(({ label }) => !state.painted.includes(label)).map(({ name }) => name);
  const notes = [];
  if (state.accepted.length + state.begun.length < 2) notes.push("Training needs at least two photos with strokes or an accepted mask.");
  if (unused.length) notes.push(`Remove or paint the classes without strokes: ${unused.join(", ")}.`);
  notes.push("A fifth of the photos with masks becomes val; pixels that nobody painted are ignored.");
  $("train-note").textContent = notes.join(" ");
  if (state.steps && !learning) $("learned").textContent = learnedText();
  showHint();
  showButtons();
}

let outcome = null;
const learnedText = () => outcome
  ? `${outcome.steps} step${outcome.steps === 1 ? "" : "s"} in ${outcome.seconds.toFixed(1)} s${outcome.loss === null ? "" : `, loss ${outcome.loss.toFixed(2)}`}`
  : "";

function showButtons() {
  const { photo } = stage;
  const accepted = photo?.status === "accepted";
  $("accept").hidden = accepted;
  $("reopen").hidden = !accepted;
  $("accept").disabled = !photo || !stage.mask || !state?.learned || state.classes.length < 2;
  $("learn").disabled = learning || !state || state.painted.length < 2;
  $("undo").disabled = !photo?.entries.length;
  $("status").textContent = !photo ? "" : accepted ? "Accepted: nothing writes over it." : photo.entries.length
    ? "Saved as painted; the rest is ignored." : !state?.learned ? "Nothing painted yet." : stage.mask ? "A proposal, not saved yet." : "The proposal is being made …";
}

// Photos

let opening = 0;
async function open(number, { scroll = true } = {}) {
  const request = ++opening;
  tools.abandon();
  showError("");
  try {
    const photo = await get(`photo?number=${number}`);
    if (request !== opening) return;
    stage.open(photo);
    $("name").textContent = `${photo.name} · ${photo.width}×${photo.height}`;
    strip.select(number, { scroll });
    showButtons();
    showHint();
    await showMask();
  } catch (error) {
    if (request !== opening) return;
    stage.photo = null;
    stage.draw();
    strip.select(number, { scroll });
    $("name").textContent = `photo ${number + 1}`;
    showError(error.message);
    showButtons();
  }
}

// Show the accepted mask, or what the network proposes.
async function showMask() {
  const { photo } = stage;
  if (!photo) return;
  try {
    if (photo.status !== "accepted" && !state.learned) return stage.showMask(null);
    const kind = photo.status === "accepted" ? "mask" : "proposal";
    const shown = await maps(`${kind}?number=${photo.number}`);
    if (stage.photo !== photo || (photo.status === "accepted") !== (kind === "mask")) return;
    stage.showMask(shown);
    showButtons();
    document.body.dataset.shown = `${photo.number}:${kind}:${shown ? shown.round ?? "" : "none"}`;
  } catch (error) {
    if (stage.photo === photo) showError(error.message);
  }
}

function update(about) {
  const { photo } = stage;
  if (photo && photo.number === about.number) Object.assign(photo, about);
  stage.draw();
  showButtons();
}

let sending = 0;
async function paint(stroke) {
  const { photo } = stage;
  photo.entries.push(stroke);
  stage.draw();
  sending++;
  try {
    const about = await change("stroke", { number: photo.number, stroke });
    sending--;
    if (!sending) update(about);
    showError("");
    if (photo.status === "accepted") await showMask();
    await refresh();
    if ($("automatic").checked) learn();
  } catch (error) {
    sending--;
    showError(`${error.message} (the stroke is not saved)`);
    const entries = photo.entries.filter((entry) => entry !== stroke);
    const about = await get(`photo?number=${photo.number}`).catch(() => ({ ...photo, entries }));
    if (stage.photo === photo) update(about);
  }
}

async function act(path) {
  const { photo } = stage;
  if (!photo) return;
  try {
    update(await change(path, { number: photo.number }));
    showError("");
    if (path !== "undo" || photo.status === "accepted" || stage.mask?.maps.entries !== undefined) await showMask();
    await refresh();
  } catch (error) {
    showError(error.message);
  }
}

async function accept() {
  const { photo } = stage;
  if (!photo || $("accept").disabled || photo.status === "accepted") return;
  $("accept").disabled = true;
  try {
    await change("accept", { number: photo.number, round: stage.mask.maps.round });
    await refresh();
    const next = strip.next();
    if (next !== null) await open(next);
    else await open(photo.number);
  } catch (error) {
    showError(error.message);
    showButtons();
  }
}

// Learning

async function learn() {
  if (!stage.photo || state.painted.length < 2) return;
  if (learning) {
    again = true;
    return;
  }
  learning = true;
  again = false;
  const seconds = Math.min(120, Math.max(1, Number($("seconds").value) || 5));
  const bar = $("bar").firstElementChild;
  const moving = bar.animate([{ width: 0 }, { width: "100%" }], { duration: 1000 * seconds, fill: "forwards" });
  $("learned").textContent = "learning …";
  showButtons();
  try {
    outcome = await post("learn", { number: stage.photo.number, seconds, scope: $("all").checked ? "all" : "decoder" });
    document.body.dataset.round = outcome.round;
    await refresh();
    await showMask();
    strip.refresh();
  } catch (error) {
    showError(error.message);
  } finally {
    moving.cancel();
    learning = false;
    $("learned").textContent = learnedText();
    showButtons();
  }
  if (again) learn();
}

// While photos are being measured, their order and previews change.
let polled = "";
setInterval(async () => {
  if (learning || document.hidden || !state) return;
  const before = `${state.measured},${state.current}`;
  try {
    await refresh();
  } catch {
    return; // an action of the person tells
  }
  const now = `${state.measured},${state.current}`;
  if (now !== before || polled !== now) strip.refresh();
  polled = now;
}, POLL);

// Controls

for (const button of document.querySelectorAll("#tools [data-tool]")) button.addEventListener("click", () => tools.choose(button.dataset.tool));
$("size").addEventListener("input", () => { tools.radius = Number($("size").value); tools.settings(); });
$("tolerance").addEventListener("input", () => { tools.tolerance = Number($("tolerance").value); tools.settings(); });
$("undo").addEventListener("click", () => act("undo"));
$("reopen").addEventListener("click", () => act("reopen"));
$("fit").addEventListener("click", () => stage.fit());
$("learn").addEventListener("click", learn);
$("accept").addEventListener("click", accept);
$("opacity").addEventListener("input", () => { stage.opacity = $("opacity").value / 100; stage.draw(); });
$("uncertain").addEventListener("change", () => { stage.uncertain = $("uncertain").checked; stage.draw(); });
$("help-open").addEventListener("click", () => $("help").showModal());
$("train-open").addEventListener("click", () => $("train").showModal());
$("copy").addEventListener("click", () => navigator.clipboard?.writeText(state.train));

const KEYS = {
  z: () => act("undo"),
  l: learn,
  r: () => stage.photo?.status === "accepted" && act("reopen"),
  u: () => $("uncertain").click(),
  n: () => $("new-name").focus(),
  ",": () => open(strip.beside(-1)),
  ".": () => open(strip.beside(1)),
  "?": () => $("help").showModal(),
};
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input:not([type=range], [type=checkbox]), [contenteditable=true], select") || document.querySelector("dialog[open]");
  if (event.key === "Escape" && event.target.matches("input")) $("stage").focus();
  if (typing || event.altKey) return;
  if (event.ctrlKey || event.metaKey) {
    if (event.key === "z") { act("undo"); event.preventDefault(); }
    return;
  }
  const key = event.key.toLowerCase();
  if (event.target.matches("button, summary") && ["enter", " "].includes(key)) return;
  if (event.target.matches("input[type=range], input[type=checkbox]") && (key.startsWith("arrow") || key === " ")) return;
  if (key === "enter") {
    if (!tools.close()) accept();
  } else if (key === "h") { stage.hidden = true; stage.draw(); }
  else if (/^[1-9]$/.test(key)) classes.key(Number(key));
  else if (KEYS[key] && !(key === " " && event.repeat)) KEYS[key]();
  else if (!tools.key(event)) return;
  event.preventDefault();
});
document.addEventListener("keyup", (event) => {
  if (event.key.toLowerCase() === "h") { stage.hidden = false; stage.draw(); }
});

tools.choose("brush");
refresh().then(async () => {
  $("seconds").value = state.seconds;
  $("all").checked = state.scope === "all";
  if (state.photos) await open(state.order[0]);
  if (state.classes.length < 2) $("new-name").focus();
  document.body.dataset.ready = "true";
}).catch((error) => showError(error.message));
