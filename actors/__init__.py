"""Upper floor: plain classes, one job each, that join a language model, the stores and the SAEs."""
