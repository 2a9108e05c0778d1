"use strict";
// Labels images by keys. Answers are class numbers in the order of the images, or -1 for a skipped one.
const content = JSON.parse(document.getElementById("content").textContent);
const element = (id) => document.getElementById(id);
const key = "catsdogs-review-" + content.digest;
let answers = load();

function load() {
  try {
    const saved = JSON.parse(localStorage.getItem(key) || "[]");
    const valid = (answer) => Number.isInteger(answer) && answer >= -1 && answer < content.classes.length;
    return Array.isArray(saved) && saved.length <= content.images.length && saved.every(valid) ? saved : [];
  } catch {
    return [];
  }
}

function store() {
  try {
    localStorage.setItem(key, JSON.stringify(answers));
  } catch {
    element("unsaved").hidden = false;
  }
}

function show() {
  const numLabelled = answers.filter((answer) => answer >= 0).length;
  const image = content.images[answers.length];
  element("progress").textContent = image
    ? `${answers.length + 1} of ${content.images.length}, ${numLabelled} labelled`
    : `all ${content.images.length} seen, ${numLabelled} labelled`;
  element("path").textContent = image ? image.shown : "";
  element("predicted").textContent = image ? `${image.predicted} ${image.prob.toFixed(3)}` : "";
  element("picture").hidden = !image || !image.src;
  element("missing").hidden = !image || Boolean(image.src);
  if (image && image.src) element("picture").src = image.src;
  element("picture").alt = image ? image.shown : "";
}

function answer(number) {
  if (answers.length < content.images.length) answers.push(number);
  store();
  show();
}

function undo() {
  answers.pop();
  store();
  show();
}

function quote(text) {
  return '"' + text.replaceAll('"', '""') + '"';
}

function save() {
  const lines = ["path,label"];
  answers.forEach((answer, i) => {
    if (answer >= 0) lines.push(quote(content.images[i].path) + "," + quote(content.classes[answer].name));
  });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }));
  link.download = "labels.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

content.classes.forEach((name, i) => {
  const button = document.createElement("button");
  button.type = "button";
  if (i < 9) {
    const number = document.createElement("kbd");
    number.textContent = String(i + 1);
    button.append(number, " ");
  }
  button.append(name.shown);
  button.addEventListener("click", () => answer(i));
  element("choices").append(button);
});
element("skip").addEventListener("click", () => answer(-1));
element("undo").addEventListener("click", undo);
element("save").addEventListener("click", save);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.key === "0") answer(-1);
  else if (event.key === "u" || event.key === "U") undo();  // with Caps Lock
  else if (/^[1-9]$/.test(event.key) && Number(event.key) <= content.classes.length) answer(Number(event.key) - 1);
});
store();
show();
