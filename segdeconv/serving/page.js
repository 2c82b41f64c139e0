"use strict";

// What comes from the checkpoint or a file is text (textContent), never markup.
const $ = (id) => document.getElementById(id);
const CELLS = ["top left", "top right", "bottom left", "bottom right"];
const SVG = "http://www.w3.org/2000/svg";

let network = null; // what /network says
let seen = null; // the last picture: what the answer's JSON says, and labels, confidence, uncertainty
let alone = null; // the class that is shown alone, if any
let cursor = null; // {x, y}: where the keyboard is
let turn = 0; // of the requests; an answer to an older one is dropped

const element = (name, className, text) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const percent = (share, digits = 1) =>
  share > 0 && 100 * share < 0.5 * 10 ** -digits ? `< ${10 ** -digits} %` : `${(100 * share).toFixed(digits)} %`;
const swatch = (index) => {
  const made = element("span", "swatch");
  made.style.background = `rgb(${network.classes[index].colour.join(",")})`;
  return made;
};

// Asking

async function answered(request) {
  let answer;
  try {
    answer = await request;
  } catch {
    throw new Error("the server does not answer - is it still running?");
  }
  if (!answer.ok) {
    const said = await answer.json().catch(() => ({}));
    throw new Error(said.error || `the server answers ${answer.status}`);
  }
  return answer;
}

function trouble(sentence) {
  $("trouble").textContent = sentence || "";
  $("trouble").hidden = !sentence;
}

async function look(file) {
  if (!file || !network) return;
  trouble("");
  if (file.size > network.max_bytes) {
    trouble(`this file is larger than ${network.max_bytes >> 20} MB - shrink it, or use the command predict`);
    return;
  }
  const mine = ++turn;
  document.body.classList.add("busy");
  try {
    const answer = await answered(
      fetch("look", { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } }),
    );
    const content = await answer.arrayBuffer();
    if (mine === turn) await show(content);
  } catch (error) {
    if (mine === turn) trouble(error.message);
  } finally {
    if (mine === turn) document.body.classList.remove("busy");
  }
}

// Showing

async function show(content) {
  const length = new DataView(content).getUint32(0, true);
  const said = JSON.parse(new TextDecoder().decode(new Uint8Array(content, 4, length)));
  const pixels = said.height * said.width;
  let place = 4 + length;
  const next = (bytes) => content.slice(place, (place += bytes));
  said.labels = new Uint8Array(next(pixels));
  said.confidence = new Uint16Array(next(2 * pixels));
  said.uncertainty = new Uint8Array(next(pixels));
  const picture = await createImageBitmap(new Blob([content.slice(place)], { type: "image/png" }));
  seen = said;
  alone = cursor = null;
  for (const name of ["picture", "classes", "doubt"]) {
    $(name).width = seen.width;
    $(name).height = seen.height;
  }
  $("picture").getContext("2d").drawImage(picture, 0, 0);
  $("path").setAttribute("viewBox", `0 0 ${seen.width} ${seen.height}`);
  $("welcome").hidden = true;
  $("result").hidden = false;
  clearPixel();
  paintClasses();
  paintDoubt();
  layer();
  legend();
  facts();
  fit();
  read(null);
}

function paint(id, colour) {
  const context = $(id).getContext("2d");
  const data = context.createImageData(seen.width, seen.height);
  const rgba = new Uint32Array(data.data.buffer); // little-endian: ABGR
  for (let at = 0; at < rgba.length; at++) rgba[at] = colour(at);
  context.putImageData(data, 0, 0);
}

function paintClasses() {
  const table = network.classes.map(({ colour: [r, g, b] }) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0);
  paint("classes", (at) => (alone === null || seen.labels[at] === alone ? table[seen.labels[at]] : 0));
}

function paintDoubt() {
  // From black through red to pale yellow, as predict draws it.
  const table = Array.from({ length: 256 }, (_, value) => {
    const t = value / 255;
    const r = Math.min(255, 380 * t), g = Math.max(0, 380 * t - 150), b = Math.max(0, 560 * t - 390);
    return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  });
  paint("doubt", (at) => table[seen.uncertainty[at]]);
}

function layer() {
  const chosen = document.querySelector("input[name=layer]:checked").value;
  for (const name of ["classes", "doubt"]) {
    $(name).hidden = name !== chosen;
    $(name).style.opacity = $("opacity").value / 100;
  }
}

function fit() {
  if (!seen) return;
  const room = $("left").clientWidth, height = Math.max(240, window.innerHeight - 215);
  let scale = Math.min(room / seen.width, height / seen.height);
  if (scale > 3) scale = Math.floor(scale); // small pictures in whole pixels
  $("stage").style.width = `${Math.round(scale * seen.width)}px`;
  $("stage").style.height = `${Math.round(scale * seen.height)}px`;
  $("stage").classList.toggle("pixels", scale > 3);
}

function legend() {
  const present = seen.areas.map((share, index) => ({ share, index })).filter(({ share }) => share > 0);
  present.sort((one, other) => other.share - one.share);
  $("legend").replaceChildren(
    ...present.map(({ share, index }) => {
      const button = element("button");
      button.type = "button";
      button.title = "Show this class alone";
      button.setAttribute("aria-pressed", "false");
      button.append(
        swatch(index), element("span", "name", network.classes[index].name), element("span", "share", percent(share)),
      );
      button.addEventListener("click", () => {
        alone = alone === index ? null : index;
        for (const other of $("legend").querySelectorAll("button")) other.setAttribute("aria-pressed", "false");
        button.setAttribute("aria-pressed", String(alone === index));
        paintClasses();
      });
      const item = element("li");
      item.append(button);
      return item;
    }),
  );
  const absent = network.classes.filter((_, index) => !seen.areas[index]).map(({ name }) => name);
  $("absent").textContent = absent.length ? `Not here: ${absent.join(", ")}` : "";
}

function facts() {
  const [height, width] = seen.network_size;
  const said = [`${seen.width}×${seen.height} pixels, looked at as ${width}×${height} in ${seen.seconds.toFixed(2)} s.`];
  if (seen.reduced_from) {
    const [before, across] = seen.reduced_from;
    said.push(`Reduced from ${across}×${before}, since ${network.largest / 1e6} million pixels are the most.`);
  }
  said.push(`Mean probability of the classes shown: ${percent(seen.mean_confidence)}.`);
  $("facts").textContent = said.join(" ");
}

// Pixels

function read(pixel) {
  if (!pixel) {
    $("readout").textContent = seen.has_path ? "Point at a pixel; click to see where its switches lead." : "Point at a pixel.";
    return;
  }
  const at = pixel.y * seen.width + pixel.x;
  const index = seen.labels[at];
  $("readout").replaceChildren(
    swatch(index),
    element("span", "name", network.classes[index].name),
    ` ${percent(seen.confidence[at] / 65535)} · uncertainty ${percent(seen.uncertainty[at] / 255, 0)} · `,
    `x ${pixel.x}, y ${pixel.y}`,
  );
}

function pixelAt(event) {
  const box = $("stage").getBoundingClientRect();
  const x = Math.floor(((event.clientX - box.left) / box.width) * seen.width);
  const y = Math.floor(((event.clientY - box.top) / box.height) * seen.height);
  return { x: Math.min(Math.max(x, 0), seen.width - 1), y: Math.min(Math.max(y, 0), seen.height - 1) };
}

function draw(name, attributes, className) {
  for (const layer of ["under", "over"]) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.setAttribute("class", `${layer} ${className || ""}`);
    $("path").append(made);
  }
}

function clearPixel() {
  $("path").replaceChildren();
  $("pixel").hidden = true;
}

async function explain(pixel) {
  const picture = seen.picture;
  let said;
  try {
    said = await (await answered(fetch(`pixel?picture=${picture}&y=${pixel.y}&x=${pixel.x}`))).json();
  } catch (error) {
    trouble(error.message);
    return;
  }
  if (seen.picture !== picture) return;
  clearPixel();
  $("pixel").hidden = false;
  $("pixel-title").textContent = `Pixel x ${pixel.x}, y ${pixel.y}`;
  const likely = said.probabilities.map((share, index) => ({ share, index })).sort((a, b) => b.share - a.share);
  $("likely").replaceChildren(
    ...likely.slice(0, 5).map(({ share, index }) => {
      const item = element("li"), bar = element("span", "bar"), fill = element("i");
      const name = element("span", "name");
      name.append(swatch(index), network.classes[index].name);
      fill.style.width = `${100 * share}%`;
      bar.append(fill);
      item.append(name, bar, element("span", "share", percent(share)));
      return item;
    }),
  );
  $("path-title").hidden = !said.path.length;
  $("steps").replaceChildren(
    ...said.path.map(({ pool, cell, share }) => {
      const item = element("li"), glyph = element("span", "window");
      for (let other = 0; other < 4; other++) glyph.append(element("i", other === cell ? "won" : ""));
      item.append(glyph, element("span", "", `pool ${pool}: ${CELLS[cell]}`), element("span", "share", percent(share, 0)));
      return item;
    }),
  );
  $("path-end").textContent = "This network has no switches: its pools do not remember where their maxima were.";
  const middle = [pixel.x + 0.5, pixel.y + 0.5];
  const size = Math.max(seen.width, seen.height) / 130;
  if (said.path.length) {
    const rectangle = ([left, top, right, bottom]) => ({ x: left, y: top, width: right - left, height: bottom - top });
    draw("rect", rectangle(said.path[0].window));
    for (const { box } of said.path) draw("rect", rectangle(box));
    const end = said.path.at(-1).place;
    const points = [middle, ...said.path.map(({ place }) => place)];
    draw("polyline", { points: points.map((point) => point.join(",")).join(" ") });
    draw("circle", { cx: end[0], cy: end[1], r: size });
    $("path-end").textContent =
      `From the deepest window down, by the majority of the channels (the share that agrees). It ends at ` +
      `x ${Math.floor(end[0])}, y ${Math.floor(end[1])}.`;
  }
  draw("circle", { cx: middle[0], cy: middle[1], r: size / 2 });
}

// Input

$("stage").addEventListener("pointermove", (event) => seen && read(pixelAt(event)));
$("stage").addEventListener("pointerleave", () => seen && read(cursor));
$("stage").addEventListener("click", (event) => {
  if (!seen) return;
  cursor = pixelAt(event);
  explain(cursor);
});
$("stage").addEventListener("keydown", (event) => {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (event.key in moves) {
    const [across, down] = moves[event.key].map((way) => way * (event.shiftKey ? 10 : 1));
    const { x, y } = cursor || { x: seen.width >> 1, y: seen.height >> 1 };
    cursor = {
      x: Math.min(Math.max(x + across, 0), seen.width - 1), y: Math.min(Math.max(y + down, 0), seen.height - 1),
    };
    clearPixel();
    draw("circle", { cx: cursor.x + 0.5, cy: cursor.y + 0.5, r: Math.max(seen.width, seen.height) / 130 }, "cursor");
    read(cursor);
  } else if (event.key === "Enter" && cursor) {
    explain(cursor);
  } else if (event.key === "Escape") {
    cursor = null;
    clearPixel();
    read(null);
  } else {
    return;
  }
  event.preventDefault();
});
for (const radio of document.querySelectorAll("input[name=layer]")) radio.addEventListener("change", layer);
$("opacity").addEventListener("input", layer);
$("file").addEventListener("change", (event) => {
  look(event.target.files[0]);
  event.target.value = ""; // so that the same file can be chosen again
});
document.addEventListener("paste", (event) => look(event.clipboardData.files[0]));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  look(event.dataTransfer.files[0]);
});
window.addEventListener("resize", fit);

answered(fetch("network"))
  .then((answer) => answer.json())
  .then((said) => {
    network = said;
    $("network").textContent = `${said.network}, ${said.classes.length} classes`;
    document.body.dataset.ready = "true";
  })
  .catch((error) => trouble(error.message));
