// The strip of photos: only those that can be seen exist, so that ten thousand cost nothing.

const STEP = 108; // pixels from photo to photo
const BESIDE = 4; // photos beyond either end that are made ready

export class Strip {
  constructor(scroller, inner, open) {
    this.scroller = scroller;
    this.inner = inner;
    this.open = open;
    this.order = [];
    this.status = new Map();
    this.current = null;
    this.items = new Map();
    this.version = 0;
    scroller.addEventListener("scroll", () => this.draw());
    scroller.addEventListener("wheel", (event) => {
      if (Math.abs(event.deltaY) <= Math.abs(event.deltaX)) return;
      scroller.scrollLeft += event.deltaY;
      event.preventDefault();
    }, { passive: false });
    new ResizeObserver(() => this.draw()).observe(scroller);
  }

  show({ order, begun, accepted, unreadable }) {
    this.order = order;
    this.status = new Map([
      ...begun.map((number) => [number, "strokes"]), ...accepted.map((number) => [number, "accepted"]),
      ...Object.keys(unreadable).map((number) => [Number(number), "unreadable"]),
    ]);
    this.inner.style.width = `${order.length * STEP}px`;
    this.draw();
  }

  select(number, { scroll = true } = {}) {
    this.current = number;
    const place = this.order.indexOf(number) * STEP;
    const { scrollLeft, clientWidth } = this.scroller;
    if (scroll && (place < scrollLeft || place + STEP > scrollLeft + clientWidth)) this.scroller.scrollLeft = place - clientWidth / 3;
    this.draw();
  }

  // The photo beside the current one.
  beside(step) {
    const index = this.order.indexOf(this.current) + step;
    return this.order[Math.min(this.order.length - 1, Math.max(0, index))];
  }

  // The most useful photo that is not accepted.
  next() {
    const open = this.order.filter((number) => number !== this.current && !["accepted", "unreadable"].includes(this.status.get(number)));
    return open.length ? open[0] : null;
  }

  refresh() {
    this.version++;
    for (const [number, item] of this.items) this.preview(item, number);
  }

  preview(item, number) {
    const image = new Image();
    image.onload = () => { item.querySelector(".preview").src = image.src; };
    image.src = `preview?number=${number}&version=${this.version}`;
  }

  draw() {
    const first = Math.max(0, Math.floor(this.scroller.scrollLeft / STEP) - BESIDE);
    const end = Math.min(this.order.length, Math.ceil((this.scroller.scrollLeft + this.scroller.clientWidth) / STEP) + BESIDE);
    const seen = new Set(this.order.slice(first, end));
    for (const [number, item] of this.items) {
      if (seen.has(number)) continue;
      item.remove();
      this.items.delete(number);
    }
    for (let index = first; index < end; index++) {
      const number = this.order[index];
      let item = this.items.get(number);
      if (!item) this.items.set(number, (item = this.created(number)));
      item.style.left = `${index * STEP}px`;
      item.setAttribute("aria-current", String(number === this.current));
      const status = this.status.get(number);
      item.querySelector(".badge").textContent = { strokes: "✎", accepted: "✓", unreadable: "!" }[status] || "";
      item.querySelector(".badge").hidden = !status;
    }
  }

  created(number) {
    const item = document.createElement("button");
    item.className = "photo";
    item.tabIndex = -1;
    item.dataset.number = number;
    const image = Object.assign(document.createElement("img"), { alt: `photo ${number + 1}`, loading: "lazy", draggable: false });
    image.onerror = () => image.remove();
    image.src = `thumbnail?number=${number}`;
    const clear = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7";
    const preview = Object.assign(document.createElement("img"), { className: "preview", alt: "", src: clear, draggable: false });
    const badge = Object.assign(document.createElement("span"), { className: "badge" });
    item.append(image, preview, badge);
    item.addEventListener("click", () => this.open(number));
    this.inner.append(item);
    this.preview(item, number);
    return item;
  }
}
