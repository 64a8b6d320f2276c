// One question at a time: it is shown, answered, and shown anew if somebody else answered it first.
// Every name comes as text and becomes text (textContent); nothing here makes HTML of it.

const at = (id) => document.getElementById(id);
const PREVIEW = 360, LARGE = 1600; // longer sides in pixels, the two that the server makes
const RETRY = 2000; // milliseconds between looks for a server that does not answer

let shown = null; // the question on the page, as the server said it
let chosen = new Set(); // numbers of the pictures of a group that are selected
let isBusy = false; // one answer at a time: a key pressed twice must not answer what is not seen yet
let hasProposed = false; // what the command line said to write
let isOver = false; // everything was written, the server is going

// ---- small tools ------------------------------------------------------------------------------

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const key = (name) => make("kbd", { textContent: name });
const some = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;
const quoted = (name) => `“${name}”`;
const percent = (p) => (p > 0 && p < 0.005 ? "< 1 %" : `${Math.round(100 * p)} %`);
const folded = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase().trim();
const addressOf = (picture, size) => `pictures/${picture.number}?size=${size}&run=${shown.run}`;

function say(text) {
  at("said").textContent = text;
}

function complain(text) {
  at("trouble").textContent = text;
  at("trouble").hidden = !text;
}

/** A picture in a frame that has no box of its own; a sentence where it cannot be shown. */
function framed(picture, size, alt) {
  const image = make("img", { alt, draggable: false });
  const frame = make("span", { className: "frame" }, image);
  image.addEventListener("load", () => {
    image.classList.toggle("tiny", Math.max(image.naturalWidth, image.naturalHeight) < 128);
  });
  image.addEventListener("error", () => {
    const text = "This picture cannot be shown; is the file still there?";
    frame.replaceChildren(make("span", { className: "unseen", textContent: text }));
  });
  if (picture.number === null) {
    frame.replaceChildren(make("span", { className: "unseen", textContent: "no picture is kept" }));
  } else {
    image.src = addressOf(picture, size);
  }
  return frame;
}

/** Waits until the picture of a frame can be drawn at once, but not for long. */
function drawable(frame) {
  const late = new Promise((resolve) => setTimeout(resolve, 4000));
  return Promise.race([frame.firstChild.decode().catch(() => {}), late]);
}

function hueOf(label) {
  const index = shown.labels.findIndex((each) => each.name === label);
  return String(Math.round((index * 137.5 + 210) % 360));
}

function dotOf(label) {
  const dot = make("span", { className: "dot", ariaHidden: "true" });
  dot.style.setProperty("--hue", hueOf(label));
  return dot;
}

// ---- talking to the server --------------------------------------------------------------------

/** What the server says; null where no server answers. */
async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  try {
    const reply = await fetch(`api/${path}`, { cache: "no-store", ...options });
    return { status: reply.status, said: await reply.json() };
  } catch {
    return null;
  }
}

/** Sends something that changes the session, and does something with the reply if it was taken. */
async function send(path, body, taken) {
  if (isBusy || isOver || !shown) return;
  isBusy = true;
  document.body.setAttribute("aria-busy", "true");
  try {
    const reply = await ask(path, { run: shown.run, number: shown.number, ...body });
    if (!reply) return await findServer();
    const { status, said } = reply;
    complain(status === 200 || status === 409 ? "" : said.error);
    if (status === 200) await taken(said);
    if (status !== 409) return;
    say(said.error);
    await show(said.question);
  } finally {
    isBusy = false;
    document.body.removeAttribute("aria-busy");
  }
}

/** The server is gone, or was started anew: waits for it, and shows what it asks. */
async function findServer() {
  complain(
    "The program in the terminal does not answer. Start it again with the same command: all answers "
    + "are kept but perhaps the last one. This page goes on by itself when it is back.",
  );
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, RETRY));
    const reply = await ask("question");
    if (reply) complain(reply.status === 200 ? "" : reply.said.error);
    if (reply?.status !== 200) continue;
    say("The program is back. Please look whether your last answer was kept.");
    return show(reply.said);
  }
}

/** Shows what is asked now: another tab may have answered in the meantime. */
async function look() {
  if (isBusy || isOver) return;
  const reply = await ask("question");
  if (isBusy) return; // an answer was sent meanwhile, which shows the next question
  if (reply && reply.status !== 200) return complain(reply.said.error);
  const isShown = reply && shown && reply.said.number === shown.number && reply.said.run === shown.run;
  if (isShown) return;
  isBusy = true;
  await (reply ? show(reply.said) : findServer());
  isBusy = false;
}

// ---- answers ----------------------------------------------------------------------------------

const numbers = () => (shown.kind === "group" ? [...chosen] : shown.pictures.map((p) => p.number));

function nameThem(label) {
  if (shown.kind !== "group" && shown.kind !== "picture") return;
  const pictures = numbers();
  if (!pictures.length) {
    say("No picture is selected. Press a picture, or a for all of them.");
    return;
  }
  const text = `${some(pictures.length, "picture")} named ${quoted(label)}.`;
  send("answer", { kind: "named", label, pictures }, async (said) => {
    leaveName();
    say(text);
    await show(said);
  });
}

function skip() {
  if (shown.kind === "done") return;
  const pictures = shown.pictures.map((picture) => picture.number);
  send("answer", { kind: "skipped", pictures }, async (said) => {
    leaveName();
    say(`${some(pictures.length, "picture")} skipped.`);
    await show(said);
  });
}

function keep(picture) {
  const dropped = shown.pictures.filter((each) => each !== picture).map((each) => each.number);
  send("answer", { kind: "kept", picture: picture.number, dropped }, async (said) => {
    say(`${picture.name} kept; ${some(dropped.length, "copy", "copies")} left out, not deleted.`);
    await show(said);
  });
}

function undo() {
  send("undo", {}, async (said) => {
    say(said.said);
    await show(said.question);
  });
}

// ---- the question -----------------------------------------------------------------------------

/** Puts a question on the page, once its picture is there, so that nothing flickers. */
async function show(question) {
  const before = shown;
  shown = question;
  const [first] = question.pictures;
  const large = question.kind === "picture"
    ? framed(first, LARGE, `The picture to name, ${first.name}`) : null;
  if (large) await drawable(large);
  chosen = new Set(question.pictures.map((picture) => picture.number));
  showProgress();
  showClasses();
  if (large) showPicture(large);
  else ({ group: showGroup, copies: showCopies, done: showDone })[question.kind]();
  showNear();
  const skipText = { group: "Skip", picture: "Skip", copies: "Keep them all" };
  at("skip").replaceChildren(`${skipText[question.kind] ?? ""} `, key("s"));
  at("skip").hidden = question.kind === "done";
  at("classes").classList.toggle("many", question.labels.length > 8);
  at("naming").hidden = at("classes").hidden = !["group", "picture"].includes(question.kind);
  at("all").hidden = question.kind !== "group";
  document.body.dataset.kind = question.kind;
  document.title = `${question.progress.left} left · Name pictures`;
  if (document.activeElement === at("name") && !at("name").value) at("asked").focus();
  if (before === null || !document.activeElement || document.activeElement === document.body) {
    at("asked").focus({ preventScroll: true });
  }
  fetchAhead();
}

/** Asks for the pictures that may come next, so that they are there when they do. */
async function fetchAhead() {
  if (shown.kind !== "picture") return;
  const reply = await ask("ahead");
  if (reply?.status !== 200) return;
  for (const number of reply.said.pictures) new Image().src = addressOf({ number }, LARGE);
}

function showProgress() {
  const { labelled, skipped, left } = shown.progress;
  const all = Math.max(1, labelled + skipped + left);
  const parts = shown.labels.filter((label) => label.count).map((label) => {
    const part = make("i", { title: `${label.name}: ${label.count}` });
    part.style.setProperty("--hue", hueOf(label.name));
    part.style.width = `${(100 * label.count) / all}%`;
    return part;
  });
  const rest = make("i", { className: "skipped", title: `skipped: ${skipped}` });
  rest.style.width = `${(100 * skipped) / all}%`;
  at("progress").replaceChildren(...parts, ...(skipped ? [rest] : []));
  const text = `${labelled} of ${labelled + skipped + left} named`
    + (skipped ? `, ${skipped} skipped` : "");
  const more = text.slice(text.indexOf(" named"));
  at("counts").replaceChildren(`${labelled} of ${labelled + skipped + left}`,
    make("span", { textContent: more }));
  const each = shown.labels.map((label) => `${label.name} ${label.count}`).join(", ");
  at("progress").setAttribute("aria-valuemax", String(all));
  at("progress").setAttribute("aria-valuenow", String(labelled + skipped));
  at("progress").setAttribute("aria-valuetext", each ? `${text}: ${each}` : text);
}

function heading(text, hint) {
  at("asked").textContent = text;
  at("hint").textContent = hint;
}

function showGroup() {
  const count = shown.pictures.length;
  heading(count === 1 ? "Name this picture" : `Name this group of ${count} pictures`, "");
  const boxes = shown.pictures.map((picture, index) => {
    const box = make("input", { type: "checkbox", checked: true, tabIndex: index ? -1 : 0 });
    box.dataset.number = picture.number;
    box.setAttribute("aria-label", `picture ${index + 1}, ${picture.name}`);
    const label = make("label", { title: picture.name }, box, framed(picture, PREVIEW, ""));
    box.addEventListener("focus", () => boxTabStop(box));
    return label;
  });
  const grid = make("div", { className: "grid" }, ...boxes);
  grid.setAttribute("role", "group");
  grid.setAttribute("aria-label", "Pictures of the group");
  grid.addEventListener("change", (event) => {
    const number = Number(event.target.dataset.number);
    if (event.target.checked) chosen.add(number);
    else chosen.delete(number);
    showChosen();
  });
  at("stage").replaceChildren(grid);
  at("stage").scrollTop = 0;
  showChosen();
}

function showChosen() {
  const isAll = chosen.size === shown.pictures.length;
  at("hint").textContent =
    `${isAll ? "All" : `${chosen.size} of ${shown.pictures.length}`} selected. `
    + (shown.labels.length ? "Press what does not belong." : "Type a name (n), then Enter.");
  at("all").replaceChildren(isAll ? "Select none " : "Select all ", key("a"));
  showGuess();
}

function chooseAll() {
  const isAll = chosen.size === shown.pictures.length;
  for (const box of at("stage").querySelectorAll("input")) box.checked = !isAll;
  chosen = new Set(isAll ? [] : shown.pictures.map((picture) => picture.number));
  showChosen();
}

function boxTabStop(box) {
  for (const other of at("stage").querySelectorAll("input")) other.tabIndex = other === box ? 0 : -1;
}

function showPicture(large) {
  const [guess] = shown.guesses;
  heading(
    "What is this?",
    guess ? `It looks like ${quoted(guess.label)}, ${percent(guess.probability)}.`
      : "There is no guess yet. Type a name (n), then Enter.",
  );
  const caption = make("figcaption", { textContent: shown.pictures[0].name });
  at("stage").replaceChildren(make("figure", {}, large, caption));
  showGuess();
}

function showGuess() {
  const [guess] = shown.guesses;
  at("yes").hidden = !guess || !["group", "picture"].includes(shown.kind);
  if (!guess) return;
  const count = chosen.size === shown.pictures.length ? `all ${chosen.size}` : `these ${chosen.size}`;
  const what = shown.kind === "group" ? `Yes, ${count} are` : "Yes, it is";
  at("yes").replaceChildren(
    make("span", { className: "name" }, `${what} `, make("b", { textContent: guess.label })),
    key("Enter"),
  );
  at("yes").onclick = () => nameThem(guess.label);
}

function showNear() {
  at("near").hidden = !shown.neighbours.length;
  at("neighbours").replaceChildren(...shown.neighbours.map(({ picture, label, similarity }) =>
    make("li", { title: picture.name },
      framed(picture, PREVIEW, ""),
      make("span", { className: "name" }, dotOf(label), ` ${label}`),
      make("span", { className: "much", textContent: similarity.toFixed(2) }))));
}

function showCopies() {
  heading(
    shown.pictures.length === 2 ? "These two are copies. Keep one" : "These are copies. Keep one",
    "The others are left out of what is written; no file is deleted.",
  );
  const figures = shown.pictures.map((picture, index) => {
    const button = make("button", { type: "button" }, "Keep this one ",
      ...(index < 9 ? [key(String(index + 1))] : []));
    if (index < 9) button.setAttribute("aria-keyshortcuts", String(index + 1));
    button.addEventListener("click", () => keep(picture));
    const caption = make("figcaption", {}, make("b", { textContent: picture.name }),
      picture.about ? make("div", { textContent: picture.about }) : "");
    return make("figure", {}, framed(picture, LARGE, picture.name), caption, button);
  });
  at("stage").replaceChildren(make("div", { className: "copies" }, ...figures));
  at("yes").hidden = true;
}

function showDone() {
  const { labelled, skipped } = shown.progress;
  heading("Every picture has an answer", `${labelled} named, ${skipped} skipped.`);
  const button = make("button", { type: "button", className: "strong" }, "Finish and write ", key("f"));
  button.addEventListener("click", openFinish);
  at("stage").replaceChildren(make("div", { className: "done" },
    make("p", { textContent: "Undo takes answers back, one by one." }), button));
  at("yes").hidden = true;
}

// ---- classes ----------------------------------------------------------------------------------

function showClasses() {
  const list = at("classes");
  const most = Math.max(...shown.guesses.map((guess) => guess.probability), 0);
  const chances = new Map(shown.guesses.map((guess) => [guess.label, guess.probability]));
  while (list.children.length > shown.labels.length) list.lastChild.remove();
  shown.labels.forEach((label, index) => {
    const button = list.children[index] ?? list.appendChild(newClass());
    const chance = shown.kind === "picture" ? chances.get(label.name) : undefined;
    const said = chance === undefined ? "" : percent(chance);
    button.dataset.label = label.name;
    button.title = label.name;
    button.style.setProperty("--hue", hueOf(label.name));
    const [cap, , name, much, count, bar] = button.children;
    cap.textContent = label.key ?? "";
    cap.style.visibility = label.key ? "visible" : "hidden";
    name.textContent = label.name;
    much.textContent = said;
    count.textContent = label.count;
    bar.style.transform = `scaleX(${chance ?? 0})`;
    button.classList.toggle("first", chance !== undefined && chance === most);
    if (label.key) button.setAttribute("aria-keyshortcuts", label.key);
    button.setAttribute("aria-label", [label.name, label.key && `key ${label.key}`,
      said && `guess ${said}`, `${label.count} named`].filter(Boolean).join(", "));
  });
  filter();
}

function newClass() {
  const button = make("button", { type: "button", className: "class" },
    key(""), make("span", { className: "dot" }), make("span", { className: "name" }),
    make("span", { className: "much" }), make("span", { className: "count" }),
    make("i", { className: "bar" }));
  button.addEventListener("click", () => nameThem(button.dataset.label));
  return button;
}

/** What the field says: the class that Enter means, and the name that would be a new class. */
function filter() {
  const text = at("name").value.trim();
  const wanted = folded(text);
  const found = [];
  for (const button of at("classes").children) {
    button.hidden = !folded(button.dataset.label).includes(wanted);
    if (!button.hidden) found.push(button.dataset.label);
  }
  const same = found.find((label) => label === text)
    ?? found.find((label) => folded(label) === wanted);
  const first = same ?? found.find((label) => folded(label).startsWith(wanted)) ?? found[0];
  const isNew = text !== "" && same === undefined;
  at("new").hidden = !isNew || found.length === 0;
  at("new").textContent = `New: ${text}`;
  at("new").title = `New class ${quoted(text)}; Shift+Enter`;
  at("what-enter-does").textContent = !text ? ""
    : first === undefined ? `Enter: new class ${quoted(text)}`
      : `Enter: ${quoted(first)}` + (isNew ? ` · Shift+Enter: new class ${quoted(text)}` : "");
  return { text, first, isNew };
}

function enterName(wantsNew) {
  const { text, first, isNew } = filter();
  if (text) nameThem(wantsNew && isNew ? text : first ?? text);
}

function leaveName() {
  at("name").value = "";
  if (document.activeElement === at("name") || document.activeElement === at("new")) {
    at("asked").focus({ preventScroll: true });
  }
  filter();
}

// ---- finishing --------------------------------------------------------------------------------

function openFinish() {
  if (isOver || !shown) return;
  const { labelled, skipped, left } = shown.progress;
  const rest = left ? ` ${left} have no answer yet; they are left as they are.` : "";
  at("finishing-said").textContent =
    `${some(labelled, "picture")} named, ${skipped} skipped.${rest}`;
  at("finishing-trouble").textContent = "";
  if (!hasProposed) {
    at("finishing-form").elements.kind.value = shown.finish.kind;
    at("finishing-form").elements.model.checked = shown.finish.with_model;
    hasProposed = true;
  }
  at("finishing").showModal();
  at("write").focus();
}

async function write(event) {
  event.preventDefault();
  const wanted = new FormData(at("finishing-form"));
  const body = { kind: wanted.get("kind"), with_model: wanted.has("model") };
  at("write").disabled = at("go-on").disabled = true;
  at("finishing-trouble").textContent = "";
  at("write").textContent = "Writing …";
  await send("finish", body, showWritten);
  at("write").replaceChildren("Write ", key("Enter"));
  at("write").disabled = at("go-on").disabled = false;
  if (isOver) return;
  at("finishing-trouble").textContent = at("trouble").textContent;
}

function showWritten(said) {
  isOver = true;
  document.body.dataset.kind = "done"; // all of the width
  at("finishing").close();
  heading("Written", "You can close this page.");
  const lines = said.said.map((line) => make("p", { textContent: line }));
  const commands = said.commands.map(({ what, command }) => {
    const copy = make("button", { type: "button", textContent: "Copy" });
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(command);
      say("Copied. Paste it in the terminal.");
    });
    const parts = [make("code", { textContent: command, tabIndex: 0 })];
    if (navigator.clipboard) parts.push(copy);
    return make("div", {}, make("p", { textContent: what }),
      make("div", { className: "command" }, ...parts));
  });
  at("stage").replaceChildren(make("div", { className: "done" }, ...lines, ...commands));
  for (const id of ["answers", "near"]) at(id).hidden = true;
  for (const id of ["undo", "help", "finish"]) at(id).disabled = true;
  say("");
  at("asked").focus({ preventScroll: true });
}

// ---- keys -------------------------------------------------------------------------------------

const HELP = [
  ["1 … 9, a letter", "the class with this key on its button"],
  ["Enter", "yes, the guess is right"],
  ["n", "find a class by its name, or name a new one (any letter without a class does so too)"],
  ["u", "undo the last answer; again: the one before"],
  ["s", "skip"],
  ["← ↑ → ↓, Space", "in a group: go to a picture, and take it out or in again"],
  ["a", "in a group: select all, or none"],
  ["1 … 9, a", "of copies: keep this one, or all"],
  ["Tab", "to every button"],
  ["f", "finish and write"],
  ["?", "these keys"],
  ["Esc", "close, or leave the field of names"],
];

function openKeys() {
  at("key-list").replaceChildren(...HELP.flatMap(([keys, what]) => [
    make("dt", {}, key(keys)), make("dd", { textContent: what })]));
  at("keys").showModal();
}

/** The key that was meant: by its place, where a keyboard has other letters or no digits there. */
function meant(event) {
  if (/^[a-z]$/i.test(event.key)) return event.key.toLowerCase();
  const place = /^(?:Digit|Key)([0-9A-Z])$/.exec(event.code);
  return place && !event.shiftKey ? place[1].toLowerCase() : event.key;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || isOver) return;
  if (!shown || document.querySelector("dialog[open]")) return;
  if (event.target === at("name")) return onNameKey(event);
  const pressed = meant(event);
  if (pressed.startsWith("Arrow")) return onArrow(event);
  if (pressed === "Enter") {
    if (event.repeat || event.target.closest("button, a")) return;
    event.preventDefault();
    if (!at("yes").hidden) at("yes").click();
    else if (!at("naming").hidden) at("name").focus();
    return;
  }
  if (pressed.length !== 1 || pressed === " ") return;
  event.preventDefault();
  if (!event.repeat) onSign(pressed, event.key);
}

function onSign(pressed, typed) {
  const isNaming = ["group", "picture"].includes(shown.kind);
  const own = { u: undo, s: skip, f: openFinish, "?": openKeys };
  if (own[pressed]) return own[pressed]();
  if (shown.kind === "copies") {
    if (pressed === "a") return skip();
    const picture = /^[1-9]$/.test(pressed) ? shown.pictures[pressed - 1] : undefined;
    return picture && keep(picture);
  }
  if (!isNaming) return undefined;
  if (pressed === "a" && shown.kind === "group") return chooseAll();
  const label = shown.labels.find((each) => each.key === pressed);
  if (label) return nameThem(label.name);
  if (/^\d$/.test(pressed)) return say(`No class has the key ${pressed} yet.`);
  at("name").focus();
  if (pressed !== "n" && pressed !== "/") at("name").value += typed;
  return filter();
}

function onNameKey(event) {
  if (event.key === "Enter") {
    event.preventDefault();
    if (!event.repeat) enterName(event.shiftKey);
  } else if (event.key === "Escape") {
    event.preventDefault();
    leaveName();
  } else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
    const first = at("classes").querySelector("button:not([hidden])");
    if (first) {
      event.preventDefault();
      first.focus();
    }
  }
}

/** Arrows go from picture to picture of a group, or from class to class. */
function onArrow(event) {
  const isClass = Boolean(event.target.closest("#classes"));
  const list = isClass || shown.kind !== "group"
    ? [...at("classes").querySelectorAll("button:not([hidden])")]
    : [...at("stage").querySelectorAll("input")];
  if (!list.length) return;
  event.preventDefault();
  const now = list.indexOf(document.activeElement);
  const top = (element) => element.getBoundingClientRect().top;
  const wide = Math.max(1, list.filter((element) => top(element) === top(list[0])).length);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -wide, ArrowDown: wide }[event.key];
  const next = now < 0 ? 0 : now + step;
  if (list[next]) list[next].focus();
}

document.addEventListener("keydown", onKey);
at("name").addEventListener("input", filter);
at("naming").addEventListener("submit", (event) => {
  event.preventDefault();
  enterName(false);
});
at("new").addEventListener("click", () => nameThem(at("name").value.trim()));
at("all").addEventListener("click", chooseAll);
at("skip").addEventListener("click", skip);
at("undo").addEventListener("click", undo);
at("help").addEventListener("click", openKeys);
at("finish").addEventListener("click", openFinish);
at("go-on").addEventListener("click", () => at("finishing").close());
at("finishing-form").addEventListener("submit", write);
document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && look());
window.addEventListener("focus", look);
look();
