"""BiT's ResNet (arXiv 1912.11370) written out in float64 NumPy: what the model is compared with.

One image, one window, one group and one unit at a time. Parameters come as the model's nested dict;
nothing here imports the model.
"""

import numpy as np

# What whose code does. `preact`: norms before the convolutions. `same`: padded as TensorFlow does,
# otherwise alike on all sides. `fill`: what the pooling is padded with. `norm_eps` is added to a
# group's variance, `std_eps` to a kernel's standard deviation and `var_eps` to its variance.
CODE_BASES = {
    "v1": dict(preact=False, same=True, fill=-np.inf, norm_eps=1e-6, std_eps=1e-5, var_eps=0.0),
    "v2": dict(preact=True, same=False, fill=0.0, norm_eps=1e-5, std_eps=0.0, var_eps=1e-10),
    "timm_v1": dict(
        preact=False, same=True, fill=-np.inf, norm_eps=1e-5, std_eps=0.0, var_eps=1e-8
    ),
    "timm_v2": dict(preact=True, same=False, fill=0.0, norm_eps=1e-5, std_eps=0.0, var_eps=1e-8),
}


def forward(params, images, style):
    """Returns the classifier's intermediates and logits, by name."""
    x = feature_maps(params["resnet"], images, style)
    x = x.reshape(len(x), -1, x.shape[-1])
    out = {"encoded": x, "pooled": x.sum(axis=1) / x.shape[1]}
    out["pre_logits"] = out["logits"] = out["pooled"]
    if "head" in params:
        out["logits"] = out["pooled"] @ params["head"]["kernel"] + params["head"]["bias"]
    return out


def feature_maps(p, images, style):
    return np.stack([_one(p, image, style) for image in images])


def _one(p, x, style):
    x = conv(x, p["conv_root"], style, stride=2)
    if not style["preact"]:
        x = relu(group_norm(x, p["norm_root"], style))
    x = windows(pad(x, 3, 2, style["same"], style["fill"]), 3, 2, lambda w: w.max(axis=(0, 1)))
    for number in (1, 2, 3, 4):
        if (stage := p.get(f"stage{number}")) is None:
            break
        x = unit(x, stage["first"], style, stride=1 if number == 1 else 2)
        for i in range(len(stage["rest"]["norm1"]["bias"]) if "rest" in stage else 0):
            x = unit(x, _slice(stage["rest"], i), style, stride=1)
    return relu(group_norm(x, p["norm"], style)) if style["preact"] else x


def unit(x, p, style, stride):
    if style["preact"]:
        y = relu(group_norm(x, p["norm1"], style))
        if "conv_proj" in p:
            x = conv(y, p["conv_proj"], style, stride)
        y = conv(y, p["conv1"], style)
        y = conv(relu(group_norm(y, p["norm2"], style)), p["conv2"], style, stride)
        y = conv(relu(group_norm(y, p["norm3"], style)), p["conv3"], style)
        return x + y
    y = relu(group_norm(conv(x, p["conv1"], style), p["norm1"], style))
    y = relu(group_norm(conv(y, p["conv2"], style, stride), p["norm2"], style))
    y = group_norm(conv(y, p["conv3"], style), p["norm3"], style)
    if "conv_proj" in p:
        x = group_norm(conv(x, p["conv_proj"], style, stride), p["norm_proj"], style)
    return relu(x + y)


def _slice(tree, i):
    return {k: _slice(v, i) if isinstance(v, dict) else v[i] for k, v in tree.items()}


def relu(x):
    return np.where(x > 0, x, 0)


def conv(x, p, style, stride=1):
    kernels = []
    for kernel in np.moveaxis(p["kernel"], -1, 0):  # of one output
        centred = kernel - kernel.sum() / kernel.size
        variance = (centred**2).sum() / kernel.size
        kernels.append(centred / (np.sqrt(variance + style["var_eps"]) + style["std_eps"]))
    kernel, side = np.stack(kernels, axis=-1), kernels[0].shape[0]
    x = pad(x, side, stride, style["same"], 0.0)
    return windows(x, side, stride, lambda window: np.tensordot(window, kernel, axes=3))


def pad(x, side, stride, same, fill):
    """Pads height and width for windows of `side` pixels."""
    widths = []
    for size in x.shape[:2]:
        before = after = side // 2
        if same:  # as many windows as fit before the last pixel; an odd one goes behind
            total = max((-(-size // stride) - 1) * stride + side - size, 0)
            before, after = total // 2, total - total // 2
        widths.append((before, after))
    return np.pad(x, (*widths, (0, 0)), constant_values=fill)


def windows(x, side, stride, function):
    h, w, _ = x.shape
    return np.stack(
        [
            np.stack(
                [
                    function(x[top : top + side, left : left + side])
                    for left in range(0, w - side + 1, stride)
                ]
            )
            for top in range(0, h - side + 1, stride)
        ]
    )


def group_norm(x, p, style):
    """32 groups of neighbouring channels, each over all positions."""
    size = x.shape[-1] // 32
    y = np.empty_like(x)
    for start in range(0, x.shape[-1], size):
        group = x[..., start : start + size]
        centred = group - group.sum() / group.size
        variance = (centred**2).sum() / group.size
        y[..., start : start + size] = centred / np.sqrt(variance + style["norm_eps"])
    return y * p["scale"] + p["bias"]
