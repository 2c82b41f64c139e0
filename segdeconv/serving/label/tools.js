// The tools: what a pen, a finger, a mouse or the keyboard does on the stage.

const MIN_STEP = 0.75; // screen pixels between points of a stroke
const NAMES = { b: "brush", e: "eraser", p: "polygon", f: "flood", v: "hand" };

export class Tools {
  // `paint` takes a finished stroke; `label` returns the label of the chosen class.
  constructor(stage, element, { paint, label, complain }) {
    Object.assign(this, { stage, element, paint, label, complain });
    this.tool = "brush";
    this.radius = 12; // screen pixels, so that the brush looks the same at every zoom
    this.tolerance = 18;
    this.pointers = new Map(); // touches, for two fingers
    this.pen = false; // once a pen was seen, fingers move the photo
    this.active = null; // the pointer that paints or moves; others do nothing, such as the palm beside a pen
    this.moving = null;
    this.waiting = null; // where a finger went down that floods or sets a corner, unless a second finger follows
    this.stroke = null;
    this.ring = [];
    const listen = (name, handler) => element.addEventListener(name, handler);
    listen("pointerdown", (event) => this.down(event));
    listen("pointermove", (event) => this.move(event));
    listen("pointerup", (event) => this.up(event));
    listen("pointercancel", (event) => this.cancel(event));
    listen("pointerleave", (event) => this.isActive(event) && this.hover(null));
    listen("contextmenu", (event) => event.preventDefault());
    listen("dblclick", () => this.close());
    element.addEventListener("wheel", (event) => {
      const box = element.getBoundingClientRect();
      const ratio = stage.canvas.width / box.width;
      stage.zoom(Math.exp(-event.deltaY / (event.ctrlKey ? 100 : 400)), (event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio);
      event.preventDefault();
    }, { passive: false });
  }

  choose(tool) {
    this.tool = tool;
    this.abandon();
    for (const button of document.querySelectorAll("#tools [data-tool]")) {
      button.setAttribute("aria-pressed", String(button.dataset.tool === tool));
    }
    document.getElementById("size-label").hidden = !["brush", "eraser"].includes(tool);
    document.getElementById("tolerance-label").hidden = tool !== "flood";
    this.element.classList.toggle("hand", tool === "hand");
    this.hover(this.stage.cursor && tool !== "hand" ? [this.stage.cursor.x, this.stage.cursor.y] : null);
    this.settings();
  }

  settings() {
    document.getElementById("size").value = this.radius;
    document.getElementById("size-text").textContent = `${2 * this.radius} px`;
    document.getElementById("tolerance").value = this.tolerance;
    document.getElementById("tolerance-text").textContent = `± ${this.tolerance}`;
  }

  adjust(direction) {
    if (this.tool === "flood") this.tolerance = Math.min(100, Math.max(1, this.tolerance + 2 * direction));
    else this.radius = Math.min(100, Math.max(1, Math.round(this.radius * 1.2 ** direction) + direction * (this.radius < 6)));
    this.settings();
    this.hover(this.stage.cursor && [this.stage.cursor.x, this.stage.cursor.y]);
  }

  get photoRadius() {
    return Math.min(2000, Math.max(0.25, (this.radius * (window.devicePixelRatio || 1)) / this.stage.scale));
  }

  hover(point) {
    const round = ["brush", "eraser"].includes(this.tool);
    const { stage } = this;
    stage.cursor = point && this.tool !== "hand" ? { x: point[0], y: point[1], radius: round ? this.photoRadius : 0 } : null;
    stage.draw();
  }

  down(event) {
    if (!this.stage.photo) return;
    this.element.focus();
    this.element.setPointerCapture(event.pointerId);
    const touch = event.pointerType === "touch";
    if (event.pointerType === "pen") {
      this.pen = true;
      this.abandonStroke(); // the pen takes over from a palm
      this.moving = null;
      this.pointers.clear();
    } else if (!this.isActive(event) && !(touch && this.pointers.size)) return;
    if (touch) {
      this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
      if (this.pointers.size > 1) {
        this.moving = null;
        return this.abandonStroke();
      }
    }
    this.active = event.pointerId;
    const finger = touch && this.pen;
    if (this.tool === "hand" || event.button === 1 || event.button === 2 || finger) {
      this.moving = [event.clientX, event.clientY];
      this.element.classList.add("moving");
      return;
    }
    const point = this.stage.at(event);
    const erases = this.tool === "eraser" || event.button === 5 || (event.buttons & 32) !== 0; // a pen's other end
    if (touch && ["polygon", "flood"].includes(this.tool)) this.waiting = point;
    else this.press(point, erases);
  }

  isActive(event) {
    return this.active === null || this.active === event.pointerId;
  }

  press(point, erases = this.tool === "eraser") {
    const label = erases ? null : this.label();
    if (label === undefined) return;
    if (this.tool === "polygon" && !erases) {
      const near = 12 * (window.devicePixelRatio || 1);
      const [x, y] = this.ring[0] || point;
      if (this.ring.length > 2 && Math.hypot(point[0] - x, point[1] - y) * this.stage.scale < near) return this.close();
      this.ring.push(point);
      this.showRing(point);
    } else if (this.tool === "flood" && !erases) {
      this.paint({ tool: "flood", class: label, point, tolerance: this.tolerance });
    } else {
      this.stroke = { tool: "brush", class: label, radius: this.photoRadius, points: [point] };
      this.stage.pending = this.stroke;
      this.stage.draw();
    }
  }

  move(event) {
    if (!this.stage.photo) return;
    if (this.pointers.has(event.pointerId) && this.pointers.size > 1) return this.pinch(event);
    if (!this.isActive(event)) return;
    if (this.moving) {
      const ratio = window.devicePixelRatio || 1;
      this.stage.move((event.clientX - this.moving[0]) * ratio, (event.clientY - this.moving[1]) * ratio);
      this.moving = [event.clientX, event.clientY];
      return;
    }
    const events = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
    for (const each of events.length ? events : [event]) this.drag(this.stage.at(each));
    this.hover(this.stage.at(event));
  }

  drag(point) {
    if (this.stroke) {
      const [x, y] = this.stroke.points.at(-1);
      if (Math.hypot(point[0] - x, point[1] - y) * this.stage.scale >= MIN_STEP) this.stroke.points.push(point);
      if (this.stroke.points.length >= 15000) this.finish();
    } else if (this.ring.length) this.showRing(point);
  }

  pinch(event) {
    const before = [...this.pointers.values()];
    this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
    const after = [...this.pointers.values()];
    const middle = ([a, b]) => [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2];
    const distance = ([a, b]) => Math.max(1, Math.hypot(a[0] - b[0], a[1] - b[1]));
    const ratio = window.devicePixelRatio || 1, box = this.element.getBoundingClientRect();
    const [x0, y0] = middle(before), [x, y] = middle(after);
    this.stage.move((x - x0) * ratio, (y - y0) * ratio);
    this.stage.zoom(distance(after) / distance(before), (x - box.left) * ratio, (y - box.top) * ratio);
  }

  up(event) {
    this.pointers.delete(event.pointerId);
    if (!this.isActive(event)) return;
    const { waiting } = this;
    this.release();
    if (waiting) this.press(waiting);
    this.finish();
  }

  cancel(event) {
    this.pointers.delete(event.pointerId);
    if (!this.isActive(event)) return;
    this.release();
    this.abandonStroke();
  }

  release() {
    this.active = this.moving = this.waiting = null;
    this.element.classList.remove("moving");
  }

  finish() {
    const { stroke } = this;
    this.stroke = this.stage.pending = null;
    if (stroke) this.paint(stroke);
  }

  showRing(point) {
    const label = this.label();
    this.stage.pending = { tool: "polygon", class: label ?? null, open: true, rings: [[...this.ring, point]] };
    this.stage.draw();
  }

  // Close the polygon; return whether there was one.
  close() {
    if (!this.ring.length) return false;
    const ring = this.ring.filter((point, index, all) => !index || Math.hypot(point[0] - all[index - 1][0], point[1] - all[index - 1][1]) > 0.01);
    this.abandon();
    if (ring.length < 3) this.complain("a polygon needs three points");
    else this.paint({ tool: "polygon", class: this.label(), rings: [ring] });
    return true;
  }

  abandon() {
    this.ring = [];
    this.abandonStroke();
  }

  // Give up the stroke, but not the corners of a polygon.
  abandonStroke() {
    this.stroke = this.waiting = null;
    if (this.ring.length) this.showRing(this.ring.at(-1));
    else this.stage.pending = null;
    this.stage.draw();
  }

  // Return whether the key was one of the tools'.
  key(event) {
    const { stage } = this;
    const name = event.key.toLowerCase();
    const arrows = { arrowleft: [-1, 0], arrowright: [1, 0], arrowup: [0, -1], arrowdown: [0, 1] };
    if (NAMES[name]) this.choose(NAMES[name]);
    else if (event.key === "[" || event.key === "]") this.adjust(event.key === "]" ? 1 : -1);
    else if (event.key === "+" || event.key === "=") stage.zoom(1.25);
    else if (event.key === "-") stage.zoom(0.8);
    else if (event.key === "0") stage.fit();
    else if (event.key === "Escape") this.abandon();
    else if (event.key === "Backspace" && this.ring.length) this.ring.pop();
    else if (arrows[name] && stage.photo) {
      const step = ((event.shiftKey ? 40 : 4) * (window.devicePixelRatio || 1)) / stage.scale;
      const from = stage.cursor || { x: stage.photo.width / 2, y: stage.photo.height / 2 };
      const limit = (value, end) => Math.min(end, Math.max(0, value));
      const point = [limit(from.x + step * arrows[name][0], stage.photo.width), limit(from.y + step * arrows[name][1], stage.photo.height)];
      this.drag(point);
      this.hover(point);
    } else if (event.key === " " && stage.photo) {
      const { x, y } = stage.cursor || { x: stage.photo.width / 2, y: stage.photo.height / 2 };
      if (this.stroke) this.finish();
      else this.press([x, y]);
      this.hover([x, y]);
    } else return false;
    return true;
  }
}
