"use strict";
/* One latent: its figures, its histogram, its layers, its neighbours, its contexts. */

strata.showLatent = async (group, j) => {
  const { el } = strata, page = document.getElementById("latent");
  try {
    const [index, shard] = await Promise.all([
      strata.load(`g${group.id}/index`),
      strata.load(`g${group.id}/${Math.floor(j / group.shard)}`),
    ]);
    const latent = shard[j % group.shard];
    const contexts = await Promise.all(latent.contexts.map((context) => strata.context(context, index.max[j])));
    if (strata.open !== `${group.id}/${j}`) return; // another one was opened meanwhile
    const total = group.n_tokens.reduce((a, b) => a + b, 0);
    const cards = [
      [`${strata.number((100 * index.count[j]) / total)} %`, "frequency"],
      [index.count[j].toLocaleString("en"), `times in use, of ${total.toLocaleString("en")}`],
      [strata.number(index.mean[j]), "mean where in use"],
      [strata.number(index.max[j]), "max"],
      [index.spread[j].toFixed(2), `layer spread, of ${group.layers.length}`],
    ].map(([value, what]) => el("div", { class: "card" }, el("b", {}, value), el("span", {}, what)));
    page.replaceChildren(
      strata.steps(group, j),
      el("h2", {}, `Latent ${j} of group ${group.id}`),
      el("div", { class: "cards" }, ...cards),
      el("div", { class: "columns" },
        el("section", {}, el("h3", {}, "Activations"), strata.histogram(latent)),
        el("section", {}, el("h3", {}, "Layers"), strata.profile(group, index, latent, j)),
        el("section", {}, el("h3", {}, "Decoded tokens"), strata.decoded(group, index, latent, j)),
        el("section", {}, el("h3", {}, "Nearest latents"), strata.nearest(group, index, latent))),
      el("h3", {}, "Top contexts"),
      contexts.length ? el("ol", { class: "contexts" }, ...contexts) : el("p", { class: "soft" }, "It never fires here."),
    );
    document.title = `Latent ${j} of group ${group.id}, ${strata.title}`;
    document.body.dataset.ready = `latent ${j}`;
  } catch (error) {
    page.replaceChildren(strata.steps(group, j), el("p", { role: "alert" }, error.message));
  }
};

/* Back to the list, and the latents before and after in its order. */
strata.steps = (group, j) => {
  const at = strata.list.order.indexOf(j), steps = [strata.el("a", { href: `#g${group.id}` }, "All latents")];
  for (const [id, text, other] of [["prior", "← Previous", at - 1], ["next", "Next →", at + 1]]) {
    const to = at < 0 ? undefined : strata.list.order[other];
    if (to !== undefined) steps.push(strata.el("a", { id, href: `#g${group.id}/${to}` }, text));
  }
  return strata.el("nav", { class: "steps", "aria-label": "Latents" }, ...steps);
};

strata.svg = (tag, attributes, text = "") => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
};

strata.histogram = (latent) => {
  const { bins, top } = latent, peak = Math.max(...bins);
  if (peak === 0) return strata.el("p", { class: "soft" }, "It never fires here.");
  const width = 400, height = 120, step = width / bins.length;
  const label = `How often each size of activation occurs, from 0 to ${strata.number(top)}; at most ${peak.toLocaleString("en")} in one of ${bins.length} bins`;
  const picture = strata.svg("svg", { viewBox: `0 0 ${width} ${height + 34}`, role: "img", "aria-label": label });
  bins.forEach((count, b) => {
    const tall = count && Math.max(1, (count / peak) * height);
    const bar = strata.svg("rect", { x: b * step + 0.5, y: height + 14 - tall, width: step - 1, height: tall });
    bar.append(strata.svg("title", {}, `${strata.number((top * b) / bins.length)} to ${strata.number((top * (b + 1)) / bins.length)}: ${count.toLocaleString("en")}`));
    picture.append(bar);
  });
  picture.append(
    strata.svg("line", { x1: 0, x2: width, y1: height + 14, y2: height + 14 }),
    strata.svg("text", { x: 0, y: 10 }, `most in a bin: ${peak.toLocaleString("en")}`),
    strata.svg("text", { x: 0, y: height + 30 }, "0"),
    strata.svg("text", { x: width / 2, y: height + 30, "text-anchor": "middle" }, "activation"),
    strata.svg("text", { x: width, y: height + 30, "text-anchor": "end" }, strata.number(top)),
  );
  return picture;
};

strata.profile = (group, index, latent, j) => {
  const { el } = strata, shares = strata.sharesOf(group, index, j);
  const head = el("tr", {}, ...["layer", "share of activity", "", "in use on"].map((t) => el("th", { scope: "col", class: t === "" ? "left" : null }, t)));
  const rows = group.layers.map((layer, l) => el("tr", {},
    el("td", {}, String(layer)), el("td", {}, `${shares[l]} %`),
    el("td", { class: "left", style: "width:45%" }, el("span", { class: "share", style: `width:${shares[l]}%` })),
    el("td", {}, `${strata.number(100 * latent.rates[l])} %`)));
  return el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows));
};

strata.decoded = (group, index, latent, j) => {
  const { el } = strata;
  if (!index.decoded) return el("p", { class: "soft" }, strata.files.get("run").not_decoded);
  const rows = strata.decodedOf(group, index, j).map((text, i) =>
    el("tr", {}, el("td", { class: "left" }, strata.chip(text)), el("td", {}, `+${strata.number(latent.logits[i])}`)));
  return el("table", {}, el("tbody", {}, ...rows));
};

strata.nearest = (group, index, latent) => {
  const { el } = strata;
  const rows = latent.nearest.map((other, i) => el("tr", {},
    el("td", {}, el("a", { href: `#g${group.id}/${other}` }, String(other))),
    el("td", {}, latent.cosines[i].toFixed(2)),
    el("td", { class: "left" }, ...(index.decoded ? strata.decodedOf(group, index, other).slice(0, 3).map(strata.chip) : []))));
  const head = el("tr", {}, el("th", { scope: "col" }, "latent"), el("th", { scope: "col" }, "cosine"), el("th", {}));
  return el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows));
};

/* One context: [place, layer, activation, document, activations around in thousandths of the latent's maximum]. */
strata.context = async ([place, layer, value, documentNumber, around], max) => {
  const { el } = strata, run = strata.files.get("run"), { text, at } = await strata.locate(place);
  const position = place % run.context, tokens = [];
  around.forEach((level, i) => {
    const there = position + i - run.before;
    if (there < 0 || there >= run.context) return;
    const token = strata.visible(text.strings[text.ids[at + i - run.before]]);
    const strength = level / 1000, shown = strata.number(strength * max);
    if (i === run.before) tokens.push(el("mark", { class: "token", title: shown, style: `background:rgba(230,159,0,${0.25 + 0.75 * strength})` }, token));
    else if (level < 0) tokens.push(el("bdi", { class: "token unread", title: "left out by the row filter, or not stored" }, token));
    else tokens.push(el("bdi", { class: "token", title: shown, style: level ? `background:rgba(230,159,0,${0.15 + 0.75 * strength})` : null }, token));
  });
  const sequence = text.sequences[Math.floor(at / run.context)];
  const from = `${strata.number(value)} at layer ${layer}; document ${documentNumber}, sequence ${sequence}, position ${position}`;
  return el("li", {}, el("div", { class: "soft" }, from), el("div", { class: "text", dir: "ltr" }, ...tokens));
};
