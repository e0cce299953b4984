"""Every law as its paper writes it, a row at a time, in plain Python floats."""

import math


def chinchilla(p, row):
    return p["E"] + p["A"] * row["parameters"] ** -p["alpha"] + p["B"] * row["tokens"] ** -p["beta"]


def power(p, row):
    return p["E"] + p["K"] * row["flops"] ** -p["gamma"]


def gamma(p, row):
    inner = p["A"] * row["parameters"] ** -p["alpha"] + p["B"] * row["tokens"] ** -p["beta"]
    return p["E"] + inner ** p["power"]


def kaplan(p, row):
    inner = p["A"] * row["parameters"] ** -p["alpha"] + p["B"] / row["tokens"]
    return p["E"] + inner ** p["power"]


def gadre(p, row):
    ratio = row["tokens"] / row["parameters"]
    both = p["P"] * ratio ** p["h"] + p["Q"] * ratio ** -p["h"]
    return p["E"] + both * row["flops"] ** -p["h"]


def rate(p, row):
    return p["c"] * row["parameters"] ** p["p"] * row["tokens"] ** p["q"]


def batch(p, row):
    return p["c"] * row["tokens"] ** p["r"]


def repeat(p, row):
    alpha, beta = p["alpha"], p["beta"]
    scale = (alpha * p["A"] / (beta * p["B"])) ** (1 / (alpha + beta))
    unique = min(row["unique_tokens"], row["tokens"])
    # The compute whose best number of tokens is `unique`, over 6; then the best size for it.
    compute = (unique * scale) ** ((alpha + beta) / alpha)
    best = min(scale * compute ** (beta / (alpha + beta)), row["parameters"])
    seen = unique * (1 + p["R_D"] * (1 - math.exp(-(row["tokens"] / unique - 1) / p["R_D"])))
    size = best * (1 + p["R_N"] * (1 - math.exp(-(row["parameters"] / best - 1) / p["R_N"])))
    return p["E"] + p["A"] * size**-alpha + p["B"] * seen**-beta


def loss_to_loss(p, row):
    return p["E"] + p["K"] * (row["loss_nats"] - p["E_x"]) ** -p["minus_k"]


def task_error(p, row):
    return p["ceiling"] - p["k"] * math.exp(-p["g"] * row["loss_nats"])


def multi_power(p, row):
    """Luo et al. 2503.12811: `row["rates"]` holds the learning rate of every step so far."""
    rates = row["rates"]
    dropped = 0.0
    for step in range(1, len(rates)):
        area = sum(rates[step:])
        inner = p["C"] * rates[step] ** -p["gamma"] * area
        dropped += (rates[step - 1] - rates[step]) * (1 - (1 + inner) ** -p["beta"])
    return p["E"] + p["A"] * sum(rates) ** -p["alpha"] - p["B"] * dropped
