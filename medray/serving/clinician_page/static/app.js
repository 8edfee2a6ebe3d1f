// The page: sign in, judge one item after the other. What is not stored yet stays on the page, whatever the network does.

import { asJson, ask, newKey } from "./api.js";
import { studyTables } from "./study.js";
import { EditableText } from "./texts.js";
import { Viewer } from "./viewer.js";

const at = (id) => document.getElementById(id);
const sides = ["first", "second"];
const words = { judged: "Saved.", skipped: "Skipped.", not_answerable: "Saved as not answerable." };

let me = null;
let item = null;
let dirty = false; // something on the page is not stored
let busy = false;
let attempt = null; // {said, key} of a save, or {key} of an undo, whose answer did not come
let again = null; // what "Try again" does
let seconds = { total: 0, since: null };

const texts = {
  question: new EditableText(at("question"), "the question", touched),
  first: new EditableText(at("first"), "answer 1", touched),
  second: new EditableText(at("second"), "answer 2", touched),
};
const viewer = new Viewer(at("view"), showView);

// --- what is on the page ---

function show(name) {
  for (const id of ["sign-in", "done", "work"]) at(id).hidden = id !== name;
  for (const id of ["account", "progress-area"]) at(id).hidden = name === "sign-in";
  at("study").hidden = name === "sign-in" || !me?.lead;
}

function say(text) {
  at("status").textContent = text;
}

function problem(text, retry = null) {
  at("problem").hidden = text === null;
  at("problem-text").textContent = text ?? "";
  at("retry").hidden = retry === null;
  again = retry;
}

function touched() {
  dirty = true;
}

function tick(side, good) {
  for (const input of document.querySelectorAll(`input[name="${side}"]`)) input.checked = good !== null && (input.value === "good") === good;
  markTicks();
}

function ticked(side) {
  const value = document.querySelector(`input[name="${side}"]:checked`)?.value;
  return value === undefined ? null : value === "good";
}

function markTicks() {
  for (const side of sides) {
    at(side).classList.toggle("good", ticked(side) === true);
    at(side).classList.toggle("bad", ticked(side) === false);
  }
}

function optional(id, text) {
  at(id).textContent = text ?? "";
  at(`${id}-row`).hidden = !text;
}

function showProgress(progress) {
  const done = progress.judged + progress.not_answerable + progress.skipped;
  at("progress-bar").max = Math.max(1, done + progress.left);
  at("progress-bar").value = done;
  at("progress-text").textContent = `${progress.judged + progress.not_answerable} judged, ${progress.skipped} skipped, ${progress.left} left`;
}

function showView(view) {
  at("zoom-text").textContent = `${view.zoom.toFixed(1)}×`;
  for (const name of ["level", "width"]) {
    at(name).value = view[name];
    at(`${name}-text`).textContent = Math.round(view[name]);
  }
  at("invert").setAttribute("aria-pressed", String(view.inverted));
}

async function showItem({ item: next, progress }) {
  showProgress(progress);
  item = next;
  dirty = false;
  if (!item) {
    show("done");
    at("done-text").focus();
    await viewer.show(null);
    return;
  }
  show("work");
  for (const id of ["modality", "caption", "context"]) optional(id, item[id]);
  const earlier = item.earlier;
  for (const name of ["question", ...sides]) texts[name].put(item[name], earlier?.[`edited_${name}`] ?? null);
  for (const side of sides) tick(side, earlier?.[`good_${side}`] ?? null);
  seconds = { total: 0, since: document.hidden ? null : performance.now() };
  at("question-text").focus({ preventScroll: true });
  window.scrollTo(0, 0);
  await showImage();
}

async function showImage() {
  const wanted = item.item_id;
  problem(null);
  try {
    await viewer.show(null);
    const blob = await (await ask(`api/image?item=${encodeURIComponent(wanted)}`)).blob();
    if (item?.item_id === wanted) await viewer.show(blob);
  } catch (error) {
    problem(`The image does not show: ${error.message}`, showImage);
  }
}

// --- what the server is asked ---

// One thing at a time; true where it was done. A failure is shown with a way to try again, and 401 leads to the sign-in and back.
async function attending(work, retry = () => attending(work)) {
  if (busy) return false;
  const buttons = document.querySelectorAll(".actions button, .undo");
  busy = true;
  for (const button of buttons) button.disabled = true;
  try {
    problem(null);
    await work();
    return true;
  } catch (error) {
    if (error.status === 401) {
      show("sign-in");
      say("");
      problem(me ? "You are signed out. Sign in again; what you did on this item is still here." : null);
      at("token").focus();
    } else {
      problem(error.message, retry);
      if (error.status === undefined) throw error; // not the network's fault but ours: for the console
    }
    return false;
  } finally {
    busy = false;
    for (const button of buttons) button.disabled = false;
  }
}

const loadNext = async () => showItem(await asJson("api/next"));

function judgement(status) {
  const said = { item_id: item.item_id, status };
  if (status !== "judged") return said;
  for (const side of sides) Object.assign(said, { [`good_${side}`]: ticked(side), [`edited_${side}`]: texts[side].changed() });
  return { ...said, edited_question: texts.question.changed() };
}

// A save whose answer did not come is sent again under its key, so that it is stored once; changed, it is another one.
function keyFor(said) {
  const content = JSON.stringify(said);
  if (attempt?.content !== content) attempt = { content, key: newKey() };
  return attempt.key;
}

const mayDrop = () =>
  !dirty || Object.values(texts).every((text) => text.changed() === null) || window.confirm("Your edits of this item will be lost. Go on?");

async function save(status) {
  if (!item || busy) return;
  if (status === "judged") {
    if (!viewer.image) return say("Wait until the image shows.");
    if (sides.some((side) => ticked(side) === null)) return say("Call each answer good or not good first.");
  } else if (!mayDrop()) return;
  const said = judgement(status);
  const stored = await attending(
    () => asJson("api/judgements", { ...said, save_key: keyFor(said), seconds: elapsed() }),
    () => save(status), // with what is on the page by then
  );
  if (!stored) return;
  attempt = null;
  item = null;
  dirty = false;
  say(words[status]);
  await attending(loadNext);
}

async function undo() {
  if (busy || (item && !mayDrop())) return;
  let found = null;
  const done = await attending(async () => {
    found = await asJson("api/undo", { save_key: keyFor({ undo: true }) });
  }, undo);
  if (!done) return;
  attempt = null;
  if (found.item) await attending(() => showItem(found));
  say(found.item ? "Taken back. Judge it again." : "There is nothing to take back.");
}

async function begin() {
  me = await asJson("api/me");
  if (me.name === null) {
    show("sign-in");
    at("token").focus();
    return;
  }
  at("title").textContent = me.title || "Clinician page";
  at("guidance").textContent = me.guidance;
  at("name").textContent = me.name;
  await loadNext();
}

async function signIn(event) {
  event.preventDefault();
  const token = at("token").value;
  await attending(async () => {
    try {
      const now = await asJson("api/sign-in", { token });
      at("token").value = "";
      const returning = item !== null && me?.name === now.name;
      problem(null);
      if (returning) show("work");
      else await begin();
    } catch (error) {
      if (error.status !== 401) throw error;
      problem(error.message);
      at("token").select();
    }
  });
}

async function signOut() {
  await attending(async () => {
    await asJson("api/sign-out", {});
    dirty = false;
    window.location.reload();
  });
}

async function showStudy() {
  if (!at("study").open) return;
  await attending(async () => at("study-body").replaceChildren(...studyTables(await asJson("api/agreement"))));
}

// Seconds that the item was in view.
function elapsed() {
  const running = seconds.since === null ? 0 : performance.now() - seconds.since;
  return Math.round(seconds.total + running) / 1000;
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden && seconds.since !== null) seconds = { total: seconds.total + performance.now() - seconds.since, since: null };
  else if (!document.hidden && seconds.since === null) seconds.since = performance.now();
});

// --- buttons and keys ---

function choose(first, second) {
  tick("first", first);
  tick("second", second);
  touched();
  say(`Answer 1: ${first ? "good" : "not good"}. Answer 2: ${second ? "good" : "not good"}.`);
}

function editAll(open) {
  for (const name of ["question", "second", "first"]) texts[name].edit(open); // the last one opened has the focus
  if (!open) at("question-text").focus();
}

const keys = {
  1: () => choose(true, false),
  2: () => choose(false, true),
  3: () => choose(true, true),
  4: () => choose(false, false),
  Enter: () => save("judged"),
  s: () => save("skipped"),
  n: () => save("not_answerable"),
  u: undo,
  e: () => editAll(true),
  "+": () => viewer.zoomBy(1.25),
  "=": () => viewer.zoomBy(1.25),
  "-": () => viewer.zoomBy(0.8),
  0: () => viewer.reset(),
  "[": () => viewer.set({ level: viewer.level - 8 }),
  "]": () => viewer.set({ level: viewer.level + 8 }),
  ",": () => viewer.set({ width: viewer.width - 16 }),
  ".": () => viewer.set({ width: viewer.width + 16 }),
  i: () => viewer.set({ inverted: !viewer.inverted }),
  "?": () => at("help").showModal(),
};

const heldKeys = "+=-[],."; // what a key that is held down may do again: change the view, and nothing that is said of an item

function onKey(event) {
  const target = event.target;
  const writing = target.matches("textarea, input[type=password]");
  if (at("help").open || at("sign-in").hidden === false) return;
  if (event.key === "Escape" && target.matches("textarea")) return editAll(false);
  if (event.key === "Enter" && event.ctrlKey && !at("work").hidden) return save("judged");
  if (writing || event.ctrlKey || event.altKey || event.metaKey || event.repeat && !heldKeys.includes(event.key)) return undefined;
  if (event.key === "Enter" && target.closest("button, a, summary")) return undefined;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (!Object.hasOwn(keys, key) || (event.key !== "Enter" && !at("shortcuts").checked)) return undefined;
  if (at("work").hidden && key !== "u" && key !== "?") return undefined;
  event.preventDefault();
  return keys[key]();
}

at("sign-in-form").addEventListener("submit", signIn);
at("sign-out").addEventListener("click", signOut);
at("save").addEventListener("click", () => save("judged"));
at("skip").addEventListener("click", () => save("skipped"));
at("not-answerable").addEventListener("click", () => save("not_answerable"));
for (const button of document.querySelectorAll(".undo")) button.addEventListener("click", undo);
for (const input of document.querySelectorAll(".ticks input")) {
  input.addEventListener("change", () => {
    touched();
    markTicks();
  });
}
at("retry").addEventListener("click", () => again?.());
at("open-help").addEventListener("click", () => at("help").showModal());
at("zoom-in").addEventListener("click", () => viewer.zoomBy(1.25));
at("zoom-out").addEventListener("click", () => viewer.zoomBy(0.8));
at("reset-view").addEventListener("click", () => viewer.reset());
at("invert").addEventListener("click", () => viewer.set({ inverted: !viewer.inverted }));
at("drag-window").addEventListener("click", () => {
  viewer.dragsWindow = !viewer.dragsWindow;
  at("drag-window").setAttribute("aria-pressed", String(viewer.dragsWindow));
  at("drag-window").textContent = viewer.dragsWindow ? "Drag: window" : "Drag: move";
});
for (const name of ["level", "width"]) at(name).addEventListener("input", (event) => viewer.set({ [name]: Number(event.target.value) }));
at("study").addEventListener("toggle", showStudy);
document.addEventListener("keydown", onKey);
window.addEventListener("beforeunload", (event) => {
  if (dirty) event.preventDefault();
});

attending(begin);
