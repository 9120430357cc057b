"""The paper's Eq. 1 to 4 written out in float64 NumPy: what the model's numbers are compared with.

One image, one head and one patch at a time. Parameters come as the model's nested dict; nothing
here imports the model.
"""

import numpy as np
import scipy.special


def forward(params, images, *, pool, position, position_at="input", gelu="tanh", eps=1e-6):
    """Returns every intermediate and the logits, stacked as the model's `capture` stacks them."""
    results = [_one(params, image, pool, position, position_at, gelu, eps) for image in images]
    out = {name: np.stack([r[name] for r in results]) for name in results[0]}
    for name in ("tokens", "attention"):  # depth before batch
        out[name] = np.moveaxis(out[name], 0, 1)
    return out


def _one(params, image, pool, position, position_at, gelu, eps):
    out = {"tokens": [], "attention": []}
    x = out["patches"] = patches(image, params["patch_embed"])
    ph, pw = params["patch_embed"]["kernel"].shape[:2]
    grid = image.shape[0] // ph, image.shape[1] // pw
    if pool == "token":
        x = np.concatenate([params["cls_token"][0], x])
    if position_at == "input":
        x = x + positions(params, position, grid, *x.shape)

    depth = len(params["blocks"]["norm1"]["scale"])
    for i in range(depth):
        block = _slice(params["blocks"], i)
        if position_at != "input":
            tables = block if position_at == "layers" else params
            x = x + positions(tables, position, grid, *x.shape)
        y = layer_norm(x, block["norm1"], eps)
        y, weights = attention(y, y, block["attention"], prefix=len(x) - grid[0] * grid[1])
        x = x + y
        x = x + mlp(layer_norm(x, block["norm2"], eps), block["mlp"], gelu)
        out["attention"].append(weights)
        out["tokens"].append(x)
    x = out["encoded"] = layer_norm(x, params["norm"], eps)

    if pool == "token":
        x = x[0]
    elif pool == "gap":
        x = sum(x) / len(x)
    elif pool == "none":
        x = x.reshape(*grid, -1)
    else:
        head = params["attention_pool"]
        y, _ = attention(head["probe"][0], x, head["attention"])
        x = (y + mlp(layer_norm(y, head["norm"], eps), head["mlp"], gelu))[0]
    out["pooled"] = x
    if "pre_logits" in params:
        x = np.tanh(x @ params["pre_logits"]["kernel"] + params["pre_logits"]["bias"])
    out["pre_logits"] = x
    if "head" in params:
        x = x @ params["head"]["kernel"] + params["head"]["bias"]
    out["logits"] = x
    return out


def _slice(tree, i):
    return {k: _slice(v, i) if isinstance(v, dict) else v[i] for k, v in tree.items()}


def patches(image, p):
    ph, pw = p["kernel"].shape[:2]
    rows = []
    for top in range(0, image.shape[0], ph):
        for left in range(0, image.shape[1], pw):
            window = image[top : top + ph, left : left + pw, :, None]
            rows.append((window * p["kernel"]).sum(axis=(0, 1, 2)) + p["bias"])
    return np.stack(rows)


def layer_norm(x, p, eps):
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + eps) * p["scale"] + p["bias"]


def positions(tables, position, grid, tokens, width):
    """What is added to the tokens [n d]: appendix D.4."""
    if position == "learned":
        return tables["pos_embed"]
    added = np.zeros((tokens, width))
    prefix = tokens - grid[0] * grid[1]
    if position == "sincos2d":
        added[prefix:] = sincos2d(*grid, width)
    if position.startswith("learned2d"):
        if prefix:
            added[:prefix] = tables["pos_embed_prefix"]
        for row in range(grid[0]):
            for column in range(grid[1]):
                x, y = tables["pos_embed_column"][column], tables["pos_embed_row"][row]
                one = x + y if position == "learned2d_added" else np.concatenate([x, y])
                added[prefix + row * grid[1] + column] = one
    return added


def attention(queries, tokens, p, prefix=0):
    """Returns the output [m d] and the weights [heads m n] (appendix A; relative ones, D.4)."""
    kernel, bias = p["qkv"]["kernel"], p["qkv"]["bias"]
    y, all_weights = p["out"]["bias"], []
    for head in range(kernel.shape[2]):
        q = queries @ kernel[:, 0, head] + bias[0, head]
        k = tokens @ kernel[:, 1, head] + bias[1, head]
        v = tokens @ kernel[:, 2, head] + bias[2, head]
        logits = q @ k.T
        if "rel_embed" in p:
            patches = (len(p["rel_embed"]) + 1) // 2
            for i in range(patches):
                for j in range(patches):
                    offset = p["rel_embed"][i - j + patches - 1, head]
                    logits[prefix + i, prefix + j] += q[prefix + i] @ offset
        weights = np.exp(logits / np.sqrt(q.shape[-1]))
        weights = weights / weights.sum(axis=-1, keepdims=True)
        y = y + weights @ v @ p["out"]["kernel"][head]
        all_weights.append(weights)
    return y, np.stack(all_weights)


def mlp(x, p, gelu):
    x = x @ p["fc1"]["kernel"] + p["fc1"]["bias"]
    if gelu == "tanh":
        x = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    else:
        x = x / 2 * (1 + scipy.special.erf(x / np.sqrt(2)))
    return x @ p["fc2"]["kernel"] + p["fc2"]["bias"]


def sincos2d(rows, columns, width):
    """big_vision's: quarters of sin and cos of the column, then sin and cos of the row."""
    quarter = width // 4
    table = np.zeros((rows * columns, width))
    for row in range(rows):
        for column in range(columns):
            for i in range(quarter):
                frequency = 10_000.0 ** (-i / (quarter - 1))
                channels = table[row * columns + column]
                channels[i] = np.sin(column * frequency)
                channels[quarter + i] = np.cos(column * frequency)
                channels[2 * quarter + i] = np.sin(row * frequency)
                channels[3 * quarter + i] = np.cos(row * frequency)
    return table
