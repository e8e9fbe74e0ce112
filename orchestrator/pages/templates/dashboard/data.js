"use strict";
/* Loading. A page that is opened from a disk may not fetch; so data files are scripts that call strata.put. */

const strata = { files: new Map(), promises: new Map() };

strata.put = (name, value) => strata.files.set(name, value);

/* The content of data/<name>.js, read once. */
strata.load = (name) => {
  if (!strata.promises.has(name)) {
    strata.promises.set(name, new Promise((resolve, reject) => {
      const script = document.createElement("script");
      const fail = () => {
        strata.promises.delete(name);
        reject(new Error(`data/${name}.js is missing or damaged; delete the dashboard's folder and make it again with: strata dashboard`));
      };
      script.src = `data/${name}.js`;
      script.onload = () => (strata.files.has(name) ? resolve(strata.files.get(name)) : fail());
      script.onerror = fail;
      document.head.append(script);
    }));
  }
  return strata.promises.get(name);
};

/* The block of the text that a place lies in, and where in it. */
strata.locate = async (place) => {
  const run = strata.files.get("run");
  const block = Math.floor(place / (run.context * run.block));
  return { text: await strata.load(`text/${block}`), at: place - block * run.context * run.block };
};

/* Small tools for the page. Text only ever enters as text, never as HTML. */
strata.el = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
};

strata.CONTROLS = /[\0-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]/gu;
strata.PICTURES = { "\n": "↵", "\t": "⇥", "\x7f": "␡" };

/* A token's text with what could not be seen, or would turn its neighbours around, made visible. */
strata.visible = (text) => {
  if (text === "") return "∅";
  const shown = text.replace(strata.CONTROLS, (c) => {
    const code = c.codePointAt(0);
    return strata.PICTURES[c] ?? (code < 32 ? String.fromCharCode(0x2400 + code) : `\\u${code.toString(16).padStart(4, "0")}`);
  });
  return shown.trim() === "" ? shown.replaceAll(" ", "␣") : shown;
};

/* A token that stands alone; long indentation in short. */
strata.chip = (text) => {
  const shown = strata.visible(text).replace(/ {4,}|␣{4,}/g, (spaces) => `␣×${spaces.length}`);
  return strata.el("bdi", { class: "token chip" }, shown);
};

strata.number = (value) => {
  if (value === 0) return "0";
  if (value < 0.001) return value.toExponential(1);
  return value < 999.5 ? value.toPrecision(3) : Math.round(value).toLocaleString("en");
};
