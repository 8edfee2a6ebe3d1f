// Ask the served models about an image, side by side. The key stays in this tab; texts of models are only ever shown as text.

const $ = (id) => document.getElementById(id);
const KEY = "medray-key";
let image = null; // data URI
let running = null; // AbortController of the requests under way

function headers() {
  const key = sessionStorage.getItem(KEY);
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function show(part) {
  $("sign-in").hidden = part !== "sign-in";
  $("try").hidden = part !== "try";
  $("account").hidden = part !== "try" || !sessionStorage.getItem(KEY);
}

async function messageOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered with ${answer.status}`;
  }
}

async function begin() {
  problem("");
  let answer;
  try {
    answer = await fetch("try", { headers: headers() });
  } catch {
    return problem("The server cannot be reached. Load the page again in a moment.");
  }
  if (answer.status === 401) {
    if (sessionStorage.getItem(KEY)) problem("This key is not known here.");
    sessionStorage.removeItem(KEY);
    show("sign-in");
    $("key").focus();
    return;
  }
  if (!answer.ok) return problem(await messageOf(answer));
  const { title, notice, tokens, models, examples } = await answer.json();
  document.title = title;
  $("title").textContent = title;
  $("notice").textContent = notice;
  $("tokens").max = tokens;
  $("tokens").value = Math.min(tokens, Number($("tokens").value));
  $("models").replaceChildren($("models").querySelector("legend"), ...models.map(choice));
  $("example-list").replaceChildren(...examples.map(card));
  $("examples").hidden = !examples.length;
  show("try");
}

function choice(model, index) {
  const label = document.createElement("label");
  const box = Object.assign(document.createElement("input"), { type: "checkbox", value: model.id, checked: index < 2 });
  const about = Object.assign(document.createElement("span"), { className: "about", textContent: model.about });
  label.append(box, model.id, about);
  return label;
}

function card(example) {
  const button = Object.assign(document.createElement("button"), { type: "button" });
  const picture = Object.assign(document.createElement("img"), { src: example.image, alt: "" });
  const words = document.createElement("span");
  const reference = Object.assign(document.createElement("span"), { className: "reference", textContent: example.reference ? `Reference: ${example.reference}` : "" });
  words.append(example.question, document.createElement("br"), reference);
  button.append(picture, words);
  button.addEventListener("click", () => {
    put(example.image);
    $("question-box").value = example.question;
    $("question-box").focus();
  });
  const item = document.createElement("li");
  item.append(button);
  return item;
}

function put(uri) {
  image = uri;
  $("shown-image").hidden = !uri;
  $("drop-text").hidden = Boolean(uri);
  $("no-image").hidden = !uri;
  if (uri) $("shown-image").src = uri;
  else $("shown-image").removeAttribute("src");
}

function read(file) {
  problem("");
  if (!file) return;
  if (!file.type.startsWith("image/")) return problem(`${file.name} is no image.`);
  const reader = new FileReader();
  reader.addEventListener("load", () => put(reader.result));
  reader.addEventListener("error", () => problem(`${file.name} cannot be read.`));
  reader.readAsDataURL(file);
}

function body(model) {
  const content = [{ type: "text", text: $("question-box").value }];
  if (image) content.unshift({ type: "image_url", image_url: { url: image } });
  return JSON.stringify({
    model, messages: [{ role: "user", content }], temperature: Number($("temperature").value), max_tokens: Number($("tokens").value), stream: true,
  });
}

function column(model) {
  const reply = Object.assign(document.createElement("article"), { className: "reply" });
  reply.dataset.model = model;
  const said = Object.assign(document.createElement("div"), { className: "said" });
  const took = Object.assign(document.createElement("div"), { className: "took" });
  reply.append(Object.assign(document.createElement("h2"), { textContent: model }), said, took);
  return { reply, said, took };
}

async function ask(model, { reply, said, took }, signal) {
  const began = performance.now();
  try {
    const answer = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: body(model), signal });
    if (!answer.ok) throw new Error(await messageOf(answer));
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      said.textContent += event.choices?.[0]?.delta?.content ?? "";
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      reply.classList.add("failed");
      said.textContent += `${said.textContent ? "\n" : ""}Failed: ${error.message}`;
    }
  }
  took.textContent = `${((performance.now() - began) / 1000).toFixed(1)} s`;
  reply.dataset.done = "true";
}

// The events of a stream, parsed; ends at [DONE].
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice(6));
    }
  }
}

async function send() {
  problem("");
  const models = [...$("models").querySelectorAll("input:checked")].map((box) => box.value);
  if (!models.length) return problem("Choose a model.");
  running = new AbortController();
  $("send").disabled = true;
  $("stop").hidden = false;
  $("status").textContent = "Asking";
  const columns = models.map(column);
  $("answers").replaceChildren(...columns.map(({ reply }) => reply));
  await Promise.all(models.map((model, index) => ask(model, columns[index], running.signal)));
  $("send").disabled = false;
  $("stop").hidden = true;
  $("status").textContent = "Answered";
}

$("sign-in-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  begin();
});
$("forget-key").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  begin();
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("question-box").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) $("ask").requestSubmit();
});
$("stop").addEventListener("click", () => running?.abort());
$("file").addEventListener("change", () => read($("file").files[0]));
$("no-image").addEventListener("click", () => {
  $("file").value = "";
  put(null);
});
for (const kind of ["dragenter", "dragover"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  read(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
  if (file) read(file);
});
begin();
