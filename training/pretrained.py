"""GPT-2 weights of other programs: Hugging Face's folders and nanoGPT's ckpt.pt. Nothing in a file is executed."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data.tokenizers import KNOWN, TOKENIZERS, Tokenizer, fits
from model import GPT, GPTConfig
from run.errors import UserError
from run.files import read_json

STANDARD = {  # what config.json may leave out; any other value is refused
    "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "add_cross_attention": False,
}  # fmt: skip
ACTIVATIONS = {"gelu_new": False, "gelu": True}  # exact_gelu by activation_function
LANDMARKS = {"bytes": ("a", 97), "gpt2": ("Ġthe", 262)}  # an entry of tokenizer.json that other vocabularies lack


class BadWeights(UserError, ValueError):
    """Weights that cannot be had, or are not a GPT-2's."""


def load(source: str, block_size: int | None = None, dropout: float = 0.0) -> GPT:
    """A float32 model on the CPU with the weights of `source`: a folder with config.json and model.safetensors (or an
    index of several files), a .safetensors file beside its config.json, a ckpt.pt file, or a name on the hub, which is
    downloaded. A smaller `block_size` drops the later positions. Raises BadWeights.
    """
    path = local(source)
    read = read_nanogpt if path.is_file() and path.suffix != ".safetensors" else read_hugging_face
    try:
        return make_model(*read(path), block_size, dropout)
    except (OSError, ValueError, RuntimeError) as error:
        raise BadWeights(f"{source!r} cannot be loaded: {' '.join(str(error).split())}") from None


def tokenizer_of(source: str, vocab_size: int) -> Tokenizer:
    """These weights' tokenizer, by tokenizer.json or else by the vocabulary's size; BadWeights for another's."""
    path = local(source)
    file = (path.parent if path.is_file() else path) / "tokenizer.json"
    try:
        entries = json.loads(file.read_bytes())["model"]["vocab"].items() if file.is_file() else LANDMARKS.values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BadWeights(f"{file} is damaged, or no tokenizer of byte pairs") from None
    for name, tokenizer in TOKENIZERS.items():
        if fits(tokenizer, vocab_size) and LANDMARKS[name] in entries:
            return tokenizer
    raise BadWeights(f"{source} has a vocabulary of {vocab_size} tokens that is unknown here: must be {KNOWN}")


def local(source: str) -> Path:
    """Where the weights are on this machine; those on the hub are downloaded. Raises BadWeights."""
    if os.path.isfile(source) or os.path.isdir(source):  # False for an impossible name, where pathlib raises
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["config.json", "tokenizer.json", "model*.safetensors*"]))
    except Exception as error:  # there are many kinds, the network's among them
        places = "a folder, a ckpt.pt file or a hub name (or, to train, 'scratch', 'resume' or 'auto')"
        why = getattr(error, "strerror", None) or type(error).__name__
        raise BadWeights(f"init_from = {source!r}: must be {places}; the hub did not give it ({why})") from None


def read_nanogpt(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """GPTConfig's arguments and the weights by name, of a ckpt.pt; ValueError where it is none."""
    try:
        # mmap: the optimizer's state, twice as large as the weights, is not read
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        shape = {name: int(value) for name, value in checkpoint["model_args"].items()}
        weights = {name.removeprefix("_orig_mod."): tensor.float() for name, tensor in checkpoint["model"].items()}
    except Exception:  # the wrong bytes can break torch.load anywhere, and its advice is to trust the file
        why = "it is damaged, or no checkpoint of nanoGPT, or holds more than tensors and numbers"
        raise ValueError(f"{why} (nothing in it was run); for a pytorch_model.bin give its folder") from None
    # Sophia's code, which knows of scaled attention, has GPT-2's GELU
    return shape | {"exact_gelu": "scale_attn_by_inverse_layer_idx" not in shape}, weights


def read_hugging_face(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """GPTConfig's arguments and the weights by name, of a folder or a file in it; ValueError or OSError if bad."""
    folder, names = (path.parent, [path.name]) if path.is_file() else (path, ["model.safetensors"])
    weights: dict[str, Tensor] = {}
    try:
        config = read_json(folder / (name := "config.json"))
        index = folder / (name := "model.safetensors.index.json")
        if index.exists() and not (folder / names[0]).exists():
            names = sorted({*read_json(index)["weight_map"].values()})
        for name in names:
            weights |= load_file(folder / name)
    except FileNotFoundError:
        how = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        raise ValueError(f"{name} is missing: for a .bin file {how} makes it, for a run tools.export") from None
    except (ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise ValueError(f"{name} is damaged: {error}") from None
    if config.get("model_type") != "gpt2":
        raise ValueError(f"config.json tells of model_type = {config.get('model_type')!r}, not 'gpt2'")
    for name, value in STANDARD.items():
        if config.get(name, value) != value:
            raise ValueError(f"config.json has {name} = {config[name]!r}, but this GPT-2 is made for {value!r}")
    if (activation := config.get("activation_function", "gelu_new")) not in ACTIVATIONS:
        raise ValueError(f"config.json has activation_function = {activation!r}, not one of {', '.join(ACTIVATIONS)}")
    shape = config | {"block_size": config.get("n_positions"), "bias": True, "exact_gelu": ACTIVATIONS[activation]}
    return shape, {name: other_way_round(name, tensor) for name, tensor in weights.items()}


def other_way_round(name: str, tensor: Tensor) -> Tensor:
    """A block's matrix is (in, out) in Hugging Face's files, and (out, in) in nanoGPT's and in model.py."""
    return tensor.t() if ".h." in f".{name}" and tensor.dim() == 2 else tensor


def make_model(shape: dict[str, Any], weights: dict[str, Tensor], block_size: int | None, dropout: float) -> GPT:
    """The model with these weights; ValueError where they are not a GPT-2's, or not of the shape."""
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    masks = (".attn.bias", ".attn.masked_bias")  # which old files have
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(masks)}
    if not {"wte.weight", "wpe.weight"} <= weights.keys():
        raise ValueError("it has no tensors wte.weight and wpe.weight, which a GPT-2 has")
    (vocab_size, n_embd), positions = weights["wte.weight"].shape, len(weights["wpe.weight"])
    if not torch.equal(weights.pop("lm_head.weight", weights["wte.weight"]), weights["wte.weight"]):
        raise ValueError("its output head is not its token embedding, to which this GPT-2 ties it")
    if type(n_head := shape.get("n_head")) is not int or n_head < 1:
        raise ValueError(f"n_head = {n_head!r} is not a number of heads")
    n_layer, bias = sum(name.endswith("ln_1.weight") for name in weights), "ln_f.bias" in weights
    scaled = bool(shape.get("scale_attn_by_inverse_layer_idx"))
    config = GPTConfig(positions, vocab_size, n_layer, n_head, n_embd, dropout, bias, scaled, shape["exact_gelu"])
    for name, value in dataclasses.asdict(config).items():
        if name != "dropout" and shape.get(name, value) != value:
            raise ValueError(f"{name} is said to be {shape[name]!r}, but its tensors have {value}")
    if block_size and block_size > positions:
        raise ValueError(f"it has {positions} positions, fewer than block_size {block_size}")
    weights["wpe.weight"] = weights["wpe.weight"][:block_size]
    with torch.device("meta"):  # no memory until the shapes are known to be right
        model = GPT(dataclasses.replace(config, block_size=block_size or positions))
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    given = {name: tensor.shape for name, tensor in weights.items()}
    if wrong := [name for name in expected | given if expected.get(name) != given.get(name)]:
        raise ValueError(f"its tensor {wrong[0]} is missing, or one too many, or of another shape")
    model.to_empty(device="cpu").load_state_dict(weights)
    return model
