"use strict";

// Rows and images are sorted by their data attributes; empty values come last.
function compare(a, b, text, descending) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const order = text ? a.localeCompare(b, "en", { numeric: true }) : a - b;
  return descending ? -order : order;
}

for (const button of document.querySelectorAll("th[aria-sort] button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
    const column = head.cellIndex, text = head.classList.contains("text");
    const descending = head.ariaSort === "none" ? !text : head.ariaSort === "ascending";
    for (const other of head.parentElement.cells) if (other.ariaSort) other.ariaSort = "none";
    head.ariaSort = descending ? "descending" : "ascending";
    const value = (row) => row.cells[column].dataset.value;
    body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b), text, descending)));
  });
}

for (const controls of document.querySelectorAll(".controls")) {
  const list = document.getElementById(controls.dataset.list);
  for (const button of controls.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      const pressed = button.ariaPressed === "true";
      const descending = pressed ? button.dataset.order !== "descending" : button.dataset.first === "descending";
      for (const other of controls.querySelectorAll("button")) other.ariaPressed = "false";
      button.ariaPressed = "true";
      button.dataset.order = descending ? "descending" : "ascending";
      button.querySelector("span").textContent = descending ? "↓" : "↑";
      const by = button.dataset.by;
      const ordered = [...list.children].sort((a, b) => compare(a.dataset[by], b.dataset[by], by === "name", descending));
      list.append(...ordered);
    });
  }
}

// A dialog shows one picture enlarged; the arrow keys move to the others of its row.
const viewer = document.getElementById("viewer");
const large = viewer.querySelector("img"), caption = viewer.querySelector("p");
let row = [], index = 0;

function show(step) {
  index = (index + step + row.length) % row.length;
  const image = row[index].querySelector("img");
  large.src = image.src;
  large.alt = image.alt;
  large.className = image.className;
  large.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
  caption.textContent = image.alt;
}

for (const button of document.querySelectorAll(".picture")) {
  button.addEventListener("click", () => {
    row = [...button.closest(".pictures").querySelectorAll(".picture")];
    index = row.indexOf(button);
    show(0);
    viewer.showModal();
    viewer.querySelector("[data-close]").focus();
  });
}
viewer.addEventListener("click", (event) => {
  if (event.target.dataset.step) show(Number(event.target.dataset.step));
  else if (event.target === viewer || "close" in event.target.dataset) viewer.close();
});
viewer.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step) show(step);
});
viewer.addEventListener("close", () => row[index].focus());

// A confusion matrix too large for numbers shows the cell under the pointer, or the one chosen with the arrow keys.
for (const map of document.querySelectorAll(".map")) {
  const { names, cells } = JSON.parse(map.querySelector("template").content.textContent);
  const image = map.querySelector("img"), output = map.querySelector("output");
  const counts = new Map(cells.map(([truth, predicted, pixels]) => [truth * names.length + predicted, pixels]));
  const totals = names.map(() => 0);
  for (const [truth, , pixels] of cells) totals[truth] += pixels;
  let truth = 0, predicted = 0;
  const update = () => {
    const pixels = counts.get(truth * names.length + predicted) || 0;
    const share = totals[truth] ? `${(100 * pixels / totals[truth]).toFixed(1)} %` : "–";
    output.textContent = `${names[truth]} → ${names[predicted]}: ${share}, ${pixels.toLocaleString("en")} pixels`;
  };
  const clamp = (value) => Math.min(names.length - 1, Math.max(0, Math.floor(value)));
  image.addEventListener("mousemove", (event) => {
    const box = image.getBoundingClientRect();
    truth = clamp((event.clientY - box.top) / box.height * names.length);
    predicted = clamp((event.clientX - box.left) / box.width * names.length);
    update();
  });
  image.addEventListener("keydown", (event) => {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] || [];
    if (down === undefined) return;
    event.preventDefault();
    truth = clamp(truth + down);
    predicted = clamp(predicted + right);
    update();
  });
}
