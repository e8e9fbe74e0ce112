"use strict";
/* What the address asks for, and what hands on the page do. */

strata.route = () => {
  const run = strata.files.get("run"), address = /^#g(\d+)(?:\/(\d+))?$/.exec(location.hash) ?? [];
  const group = run.groups.find((g) => g.id === Number(address[1])) ?? run.groups[0];
  const isOther = group !== strata.group;
  document.title = strata.title;
  strata.group = group;
  for (const link of document.querySelectorAll("#groups a")) {
    if (link.hash === `#g${group.id}`) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
  const j = address[2] === undefined ? null : Number(address[2]);
  const isKnown = location.hash === "" || (address[1] !== undefined && group.id === Number(address[1]) && !(j >= group.n_latents));
  const was = strata.open;
  strata.open = j === null ? null : `${group.id}/${j}`;
  document.getElementById("list").hidden = j !== null || !isKnown;
  document.getElementById("latent").hidden = j === null && isKnown;
  const listed = isOther ? strata.updateList() : Promise.resolve();
  if (!isKnown) {
    const there = run.groups.map((g) => `#g${g.id}/0 to #g${g.id}/${g.n_latents - 1}`).join(", ");
    document.getElementById("latent").replaceChildren(strata.steps(group, j),
      strata.el("p", { role: "alert" }, `There is nothing at ${location.hash}; latents are ${there}: correct the address, or go to the list.`));
    listed.then(() => { document.body.dataset.ready = "nothing"; });
  } else if (j !== null) {
    document.getElementById("latent").replaceChildren(strata.el("p", { class: "soft" }, "Loading ..."));
    listed.then(() => strata.showLatent(group, j)).then(() => document.getElementById("latent").focus({ preventScroll: true }));
    scrollTo(0, 0);
  } else {
    listed.then(() => {
      document.body.dataset.ready = "list";
      if (was) document.querySelector(`#rows a[href="#g${was}"]`)?.focus();
    });
  }
};

strata.press = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input, select");
  const follow = (node) => node && (event.preventDefault(), node.click());
  if (event.key === "Escape" && strata.open) follow(document.querySelector(".steps a"));
  else if (event.key === "/" && !typing && !strata.open) {
    event.preventDefault();
    document.getElementById("query").focus();
  } else if (!typing && event.key === "ArrowLeft") follow(document.getElementById("prior"));
  else if (!typing && event.key === "ArrowRight") follow(document.getElementById("next"));
};

strata.start = async () => {
  const get = (id) => document.getElementById(id);
  try {
    const run = await strata.load("run");
    get("groups").replaceChildren(...run.groups.map((g) =>
      strata.el("a", { href: `#g${g.id}` }, `group ${g.id}: ${g.layers.length > 1 ? "layers" : "layer"} ${g.layers.join(", ")}`)));
    let timer;
    get("query").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(strata.updateList, 200); });
    get("query").addEventListener("keydown", async (event) => {
      if (event.key !== "Enter") return;
      clearTimeout(timer);
      await strata.updateList();
      const number = strata.numberIn(strata.group, get("query").value, get("where").value);
      if (number === null) document.querySelector("#rows a")?.click();
      else location.hash = `#g${strata.group.id}/${number}`;
    });
    for (const id of ["where", "alive"]) get(id).addEventListener("change", strata.updateList);
    get("sort").addEventListener("change", () => { strata.list.descending = get("sort").value !== "number"; strata.updateList(); });
    get("direction").addEventListener("click", () => { strata.list.descending = !strata.list.descending; strata.updateList(); });
    get("before").addEventListener("click", () => strata.turnTo(strata.list.page - 1));
    get("after").addEventListener("click", () => strata.turnTo(strata.list.page + 1));
    get("page").addEventListener("change", () => strata.turnTo((Number(get("page").value) || 1) - 1));
    addEventListener("hashchange", strata.route);
    addEventListener("keydown", strata.press);
    strata.route();
  } catch (error) {
    get("found").textContent = error.message;
  }
};

strata.title = document.title;
strata.start();
