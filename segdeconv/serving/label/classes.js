// The list of classes: choose, name, rename, recolour and remove.

const $ = (id) => document.getElementById(id);
const parse = (hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));

export class Classes {
  constructor(change, changed) {
    this.change = change; // sends a change and returns whether it was accepted
    this.changed = changed; // called after another class was chosen
    this.list = [];
    this.label = null;
    $("new-class").addEventListener("submit", async (event) => {
      event.preventDefault();
      const name = $("new-name").value.trim();
      if (!name || !(await this.change({ action: "add", name }))) return;
      $("new-name").value = "";
      this.choose(this.list.at(-1).label);
      if (this.list.length < 2) $("new-name").focus();
      else $("stage").focus();
    });
  }

  get colours() {
    return new Map(this.list.map(({ label, colour }) => [label, parse(colour)]));
  }

  show(list, suggestions) {
    const same = JSON.stringify([list, suggestions]) === this.shown;
    this.list = list;
    if (!list.some(({ label }) => label === this.label)) this.label = list.length ? list[0].label : null;
    if (!same) this.draw(suggestions);
    this.shown = JSON.stringify([list, suggestions]);
  }

  choose(label) {
    if (!this.list.some((each) => each.label === label)) return;
    this.label = label;
    for (const item of $("classes").querySelectorAll(".class")) item.setAttribute("aria-checked", String(Number(item.dataset.label) === label));
    this.changed();
  }

  key(digit) {
    if (this.list[digit - 1]) this.choose(this.list[digit - 1].label);
  }

  draw(suggestions) {
    document.body.classList.toggle("empty", this.list.length < 2);
    $("classes").replaceChildren(...this.list.map((each, index) => this.item(each, index)));
    $("suggestions").replaceChildren(
      ...suggestions.map((name) => Object.assign(document.createElement("option"), { value: name })),
    );
    $("new-name").placeholder = ["Name the first class", "Name a second class"][this.list.length] || "Add a class";
  }

  item({ label, name, colour }, index) {
    const item = document.createElement("li"), row = document.createElement("div");
    row.className = "class";
    row.dataset.label = label;
    row.tabIndex = 0;
    row.setAttribute("role", "radio");
    row.setAttribute("aria-checked", String(label === this.label));
    const picker = Object.assign(document.createElement("input"), { type: "color", value: colour, title: "Colour" });
    picker.addEventListener("change", async () => {
      if (!(await this.change({ action: "change", label, colour: picker.value }))) picker.value = colour;
    });
    const text = Object.assign(document.createElement("span"), { className: "text", textContent: name, title: `${name} (double click to rename)` });
    text.addEventListener("dblclick", () => this.rename(text, label, name));
    const key = document.createElement("kbd");
    key.textContent = index + 1;
    key.hidden = index >= 9;
    const drop = Object.assign(document.createElement("button"), { className: "drop", textContent: "×", title: "Remove the class" });
    drop.addEventListener("click", (event) => {
      event.stopPropagation();
      this.change({ action: "remove", label });
    });
    row.append(picker, text, key, drop);
    row.addEventListener("click", () => this.choose(label));
    row.addEventListener("keydown", (event) => {
      if (event.target !== row) return;
      if (event.key === "Enter" || event.key === " ") this.choose(label);
      else if (event.key === "F2") this.rename(text, label, name);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    item.append(row);
    return item;
  }

  rename(text, label, name) {
    text.contentEditable = "true";
    text.focus();
    getSelection().selectAllChildren(text);
    const done = async (keep) => {
      text.onblur = text.onkeydown = null;
      text.contentEditable = "false";
      const wanted = text.textContent.trim();
      if (!keep || wanted === name || !(await this.change({ action: "change", label, name: wanted }))) text.textContent = name;
    };
    text.onblur = () => done(true);
    text.onkeydown = (event) => {
      event.stopPropagation();
      if (event.key === "Enter" || event.key === "Escape") {
        event.preventDefault();
        done(event.key === "Enter");
        $("stage").focus();
      }
    };
  }
}
