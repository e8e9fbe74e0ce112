"use strict";
/* The list: what is found, in which order, a page of it at a time. */

strata.PAGE = 50;
strata.list = { order: [], page: 0, descending: true, asked: 0 };

/* Show the group's latents by what the controls say. */
strata.updateList = async () => {
  const { list } = strata, group = strata.group, asked = ++list.asked;
  const status = document.getElementById("found");
  const get = (id) => document.getElementById(id);
  try {
    const index = await strata.load(`g${group.id}/index`);
    const query = get("query").value;
    const found = query === "" ? null : await strata.search(group, index, query, get("where").value);
    if (asked !== list.asked) return; // something newer was asked meanwhile
    const alive = get("alive").checked, sort = get("sort").value;
    const keys = strata.keys(group, index, sort), order = [];
    for (let j = 0; j < group.n_latents; j++) {
      if ((!alive || index.count[j] > 0) && (found === null || found[j])) order.push(j);
    }
    const sign = list.descending ? -1 : 1;
    order.sort((a, b) => sign * (keys[a] - keys[b]) || a - b);
    list.order = order;
    list.page = 0;
    get("direction").textContent = list.descending ? "largest first" : "smallest first";
    for (const th of document.querySelectorAll("th[data-sort]")) {
      if (th.dataset.sort === sort) th.setAttribute("aria-sort", list.descending ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    }
    const nDead = index.count.reduce((n, count) => n + (count === 0), 0);
    status.textContent = `${order.length.toLocaleString("en")} of ${group.n_latents.toLocaleString("en")} latents; `
      + `${nDead.toLocaleString("en")} never fire here.`;
    strata.drawRows(index);
    document.body.dataset.ready = "list";
  } catch (error) {
    status.textContent = error.message;
  }
};

strata.keys = (group, index, sort) => {
  if (sort === "number") return Array.from({ length: group.n_latents }, (_, j) => j);
  return sort === "frequency" ? index.count : index[sort];
};

/* What decides nothing about the order is built for one page only. */
strata.drawRows = (index) => {
  const { list, el } = strata, group = strata.group;
  const nPages = Math.max(1, Math.ceil(list.order.length / strata.PAGE));
  list.page = Math.min(Math.max(0, list.page), nPages - 1);
  const shown = list.order.slice(list.page * strata.PAGE, (list.page + 1) * strata.PAGE);
  const total = group.n_tokens.reduce((a, b) => a + b, 0);
  const rows = shown.map((j) => {
    const link = el("a", { href: `#g${group.id}/${j}`, "aria-label": `Latent ${j}` }, String(j));
    const row = el("tr", {}, el("td", { class: "number" }, link));
    if (index.decoded) row.append(el("td", { class: "left" }, ...strata.decodedOf(group, index, j).slice(0, 4).map(strata.chip)));
    const fires = index.fires[j] < 0 ? [] : [strata.chip(index.strings[index.fires[j]])];
    row.append(
      el("td", { class: index.decoded ? "left narrow-off" : "left" }, ...fires),
      el("td", { class: "number" }, `${strata.number((100 * index.count[j]) / total)} %`),
      el("td", { class: "number narrow-off" }, strata.number(index.max[j])),
      el("td", { class: "number narrow-off" }, strata.number(index.mean[j])),
      el("td", { class: "left number" }, strata.bars(group, index, j), ` ${index.spread[j].toFixed(1)}`),
    );
    return row;
  });
  document.getElementById("rows").replaceChildren(...rows);
  document.getElementById("page").value = list.page + 1;
  document.getElementById("page").max = nPages;
  document.getElementById("pages").textContent = nPages.toLocaleString("en");
  document.getElementById("before").disabled = list.page === 0;
  document.getElementById("after").disabled = list.page >= nPages - 1;
};

strata.decodedOf = (group, index, j) =>
  index.decoded.slice(j * group.n_decoded, (j + 1) * group.n_decoded).map((string) => index.strings[string]);

/* A latent's share of activity at each layer, in percent. */
strata.sharesOf = (group, index, j) => group.layers.map((_, l) => index.shares[j * group.layers.length + l]);

strata.bars = (group, index, j) => {
  const shares = strata.sharesOf(group, index, j), top = Math.max(...shares, 1);
  const label = group.layers.map((layer, l) => `layer ${layer}: ${shares[l]} %`).join(", ");
  const bars = shares.map((share) => strata.el("i", { style: `height:${(100 * share) / top}%` }));
  return strata.el("span", { class: shares.length > 8 ? "bars many" : "bars", role: "img", "aria-label": label, title: label }, ...bars);
};

strata.turnTo = async (page) => {
  strata.list.page = page;
  strata.drawRows(await strata.load(`g${strata.group.id}/index`));
};
