"use strict";
/* Which latents a query finds: by number, by decoded tokens, by the text of their contexts. */

/* The latent whose number a query is, if it may be one. */
strata.numberIn = (group, query, where) => {
  const number = where === "all" || where === "number" ? /^\s*#?(\d+)\s*$/.exec(query) : null;
  return number && Number(number[1]) < group.n_latents ? Number(number[1]) : null;
};

/* 1 for each latent that is found. */
strata.search = async (group, index, query, where) => {
  const found = new Uint8Array(group.n_latents);
  // A field can't hold new lines or tabs; their signs on the page stand for them.
  const wanted = query.toLowerCase().replaceAll("↵", "\n").replaceAll("⇥", "\t");
  const number = strata.numberIn(group, query, where);
  if (number !== null) found[number] = 1;
  if (index.decoded && (where === "all" || where === "decoded")) {
    const hits = index.strings.map((text) => text.toLowerCase().includes(wanted));
    index.decoded.forEach((string, entry) => {
      if (hits[string]) found[Math.floor(entry / group.n_decoded)] = 1;
    });
  }
  if (where === "all" || where === "contexts") {
    const [places, centres] = await Promise.all([
      strata.load(`g${group.id}/contexts`),
      strata.centres(wanted),
    ]);
    places.forEach((place, entry) => {
      if (place >= 0 && centres[place]) found[Math.floor(entry / group.n_contexts)] = 1;
    });
  }
  return found;
};

/* 1 for each place whose context holds the wanted text as a whole. */
strata.centres = async (wanted) => {
  const run = strata.files.get("run");
  const centres = new Uint8Array(run.n_sequences * run.context);
  const nBlocks = Math.ceil(run.n_sequences / run.block);
  const blocks = await Promise.all(Array.from({ length: nBlocks }, (_, b) => strata.load(`text/${b}`)));
  blocks.forEach((block, b) => {
    const lower = block.strings.map((text) => text.toLowerCase());
    for (let start = 0; start < block.ids.length; start += run.context) {
      const first = b * run.block * run.context + start;
      strata.mark(centres, first, block.ids.slice(start, start + run.context).map((id) => lower[id]), wanted);
    }
  });
  return centres;
};

/* Mark the centres of a sequence's contexts in which the wanted text stands. */
strata.mark = (centres, first, tokens, wanted) => {
  const run = strata.files.get("run");
  const starts = [0];
  for (const token of tokens) starts.push(starts[starts.length - 1] + token.length);
  const text = tokens.join("");
  const tokenAt = (character) => {
    let low = 0, high = tokens.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (starts[middle] <= character) low = middle; else high = middle - 1;
    }
    return low;
  };
  for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + 1)) {
    const begin = tokenAt(at), end = tokenAt(at + wanted.length - 1);
    const low = Math.max(0, end - run.after), high = Math.min(tokens.length - 1, begin + run.before);
    if (low <= high) centres.fill(1, first + low, first + high + 1);
  }
};
