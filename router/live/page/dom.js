// Elements of the page. What others wrote (names of workers, reasons, prompts) becomes text nodes and attributes only,
// never markup: nothing here parses HTML, and the page's Content-Security-Policy forbids it (Trusted Types).

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes (null and false: left out) and children: nodes, or values that become text. */
export function el(tag, attributes, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same, of SVG. */
export function svg(tag, attributes, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else attribute(node, name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** One of the icons in index.html. Decoration: what it says is in words beside it. */
export function icon(name, className = "icon") {
  return svg("svg", { class: className, "aria-hidden": "true" }, svg("use", { href: `#i-${name}` }));
}

/** Sets an attribute if it changes. null and false remove it. */
export function attribute(node, name, value) {
  if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value === true ? "" : String(value));
}

/** Sets the text of an element that has nothing else, if it changes: an unchanged one costs no layout. */
export function text(node, value) {
  const wanted = String(value);
  const now = node.firstChild;
  if (now === null) node.append(wanted);
  else if (now.data !== wanted) {
    if (now.nodeType === Node.TEXT_NODE && now.nextSibling === null) now.data = wanted;
    else node.textContent = wanted;
  }
}

const END = 9; // characters of a name that are never left out: the part of a pod's name that no other pod has

/**
 * Shows a name in one line. Where the room is too small, its middle is left out, not its end, in which names of pods differ.
 * A screen reader and the tooltip have all of it. `before`: words for the screen reader alone.
 */
export function nameLabel(node, name, before = "") {
  if (node.title === name) return;
  attribute(node, "title", name);
  node.classList.add("name-label");
  const at = Math.max(0, name.length - END);
  node.replaceChildren(el("span", { class: "hidden-text" }, before + name),
    el("span", { class: "name-start", "aria-hidden": "true" }, name.slice(0, at)),
    el("span", { class: "name-end", "aria-hidden": "true" }, name.slice(at)));
}

export function show(node, visible) {
  if (node.hidden === visible) node.hidden = !visible;
}

/** Sets a custom property, which the style sheets read. (A style attribute would be refused by the page's policy.) */
export function property(node, name, value) {
  const wanted = String(value);
  if (node.style.getPropertyValue(name) !== wanted) node.style.setProperty(name, wanted);
}

/** A bar that is filled by a share; `fillMeter` says how far. Decoration: the figure is beside it. */
export const meter = (tag = "span") => el(tag, { class: "meter", "aria-hidden": "true" });

/** Fills a bar by a share between 0 and 1; null: it is not known. */
export function fillMeter(node, share) {
  node.classList.toggle("unknown", share === null);
  property(node, "--share", share === null ? 0 : Math.round(share * 1000) / 1000);
}

export const byId = (id) => document.getElementById(id);

/**
 * Children of `parent`, one for each item, kept by key: an item that stays keeps its element, so that only what changed
 * is drawn, and the focus stays where it is.
 *
 * `create(item)` gives `{node, update(item)}`.
 */
export class KeyedList {
  #parent;
  #create;
  #rows = new Map();

  constructor(parent, create) {
    this.#parent = parent;
    this.#create = create;
  }

  /** What `create` gave for the item of this key, if there is one. */
  row(key) {
    return this.#rows.get(key);
  }

  /** Forgets all elements: they are made anew. */
  clear() {
    this.#parent.replaceChildren();
    this.#rows.clear();
  }

  render(items, keyOf) {
    const wanted = new Set(items.map(keyOf));
    for (const [key, row] of this.#rows) {
      if (!wanted.has(key)) {
        row.node.remove();
        this.#rows.delete(key);
      }
    }
    const focused = document.activeElement;
    let next = this.#parent.firstChild;
    for (const item of items) {
      const key = keyOf(item);
      let row = this.#rows.get(key);
      if (row === undefined) this.#rows.set(key, (row = this.#create(item)));
      row.update(item);
      if (row.node === next) next = next.nextSibling;
      else this.#parent.insertBefore(row.node, next);
    }
    if (focused !== document.activeElement && this.#parent.contains(focused)) focused.focus({ preventScroll: true });
  }
}
