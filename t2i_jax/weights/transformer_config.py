"""Our options of diffusion transformers as diffusers' config.json has them, and back.

Options are the attributes of the networks (`networks.mmdit.MMDiT`, `networks.dit.DiT`), and
`in_channels`, `resolution` (side of the latents that it was trained on), `context_width` and
`pooled_width` (of the text; 0 where none is read).
"""

from collections.abc import Callable, Mapping
from typing import Any

from t2i_jax.errors import UserError

Options = Mapping[str, Any]
SD3, DIT, PIXART = "SD3Transformer2DModel", "DiTTransformer2DModel", "PixArtTransformer2DModel"
# The class of the last two before they had classes of their own, and how it tells them apart.
OLD, OLD_KINDS = "Transformer2DModel", {"ada_norm_zero": DIT, "ada_norm_single": PIXART}
MLP_RATIO = 4.0  # of all of them
EPSILON = 1e-6  # of the norms of DiT and PixArt-alpha, as they were trained
# What diffusers takes where its config.json is silent.
_SIZES = {"sample_size": 128, "patch_size": 2, "num_layers": 28, "attention_head_dim": 72,
          "num_attention_heads": 16, "in_channels": 4}  # fmt: skip
_DEFAULTS = {
  SD3: {
    **_SIZES, "in_channels": 16, "num_layers": 18, "attention_head_dim": 64,
    "num_attention_heads": 18, "joint_attention_dim": 4096, "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 96,
    "dual_attention_layers": (), "qk_norm": None,
  },
  DIT: {**_SIZES, "sample_size": 32, "out_channels": None, "num_embeds_ada_norm": 1000,
        "norm_eps": 1e-5, "norm_type": "ada_norm_zero"},
  PIXART: {
    **_SIZES, "out_channels": 8, "cross_attention_dim": 1152, "caption_channels": None,
    "interpolation_scale": None, "use_additional_conditions": None, "norm_eps": EPSILON,
    "norm_type": "ada_norm_single",
  },
}  # fmt: skip
# What must be so in all others, where it is said.
_FIXED = {
  "dropout": 0.0, "attention_bias": True, "activation_fn": "gelu-approximate",
  "norm_elementwise_affine": False, "attention_type": "default", "double_self_attention": False,
  "only_cross_attention": False, "use_linear_projection": False, "num_vector_embeds": None,
}  # fmt: skip
# What they do not read.
_UNREAD = ("norm_num_groups", "upcast_attention", "num_embeds_ada_norm", "cross_attention_dim",
           "caption_channels", "interpolation_scale", "use_additional_conditions")  # fmt: skip


def kind_of(published: Mapping[str, Any]) -> str:
  """The class of a config.json, by its present name; "" for one that is not of a transformer."""
  named = published.get("_class_name")
  if named == OLD:
    return OLD_KINDS.get(published.get("norm_type"), "")
  return named if named in _DEFAULTS else ""


def from_diffusers(published: Mapping[str, Any]) -> dict[str, Any]:
  """Our options of a config.json.

  Raises:
    UserError: for what our networks have not, by the name of its setting.
  """
  kind = kind_of(published)
  if not kind:
    raise UserError(f"a transformer of class {published.get('_class_name')} is not known; known: "
                    f"{', '.join(_DEFAULTS)}")
  given = {**_DEFAULTS[kind], **{k: v for k, v in published.items() if not k.startswith("_")}}
  for name, value in given.items():
    known = name in _DEFAULTS[kind] or name in _UNREAD
    if not known and (value or None) != (_FIXED.get(name) or None):
      only = f", only with {_FIXED[name]}" if name in _FIXED else ""
      raise UserError(f"a transformer with {name}={value} is not known{only}")
  width = given["num_attention_heads"] * given["attention_head_dim"]
  shared = {
    "patch": given["patch_size"], "width": width, "depth": given["num_layers"],
    "heads": given["num_attention_heads"], "mlp_ratio": MLP_RATIO,
    "in_channels": given["in_channels"], "out_channels": given["out_channels"],
    "resolution": given["sample_size"],
  }  # fmt: skip
  return {**shared, **_READERS[kind](given, width)}


def _sd3(given: Mapping[str, Any], width: int) -> dict[str, Any]:
  dual = list(given["dual_attention_layers"])
  _only(given, "caption_projection_dim", width)
  _only(given, "qk_norm", None, "rms_norm")
  if dual != list(range(len(dual))):
    raise UserError(f"a transformer with dual_attention_layers={dual} is not known, only with the "
                    "first ones")
  return {
    "norm": given["qk_norm"] is not None, "dual": len(dual),
    "grid": given["sample_size"] // given["patch_size"], "largest": given["pos_embed_max_size"],
    "context_width": given["joint_attention_dim"], "pooled_width": given["pooled_projection_dim"],
  }  # fmt: skip


def _dit(given: Mapping[str, Any], width: int) -> dict[str, Any]:
  # With diffusers' default it draws as with the authors' own, to the digits of half precision.
  _only(given, "norm_eps", EPSILON, 1e-5)
  return {
    "modulation": "zero", "position_scale": 1.0, "classes": given["num_embeds_ada_norm"],
    "out_channels": given["out_channels"] or given["in_channels"], "context_width": 0,
    "pooled_width": 0,
  }  # fmt: skip


def _pixart(given: Mapping[str, Any], width: int) -> dict[str, Any]:
  _only(given, "norm_eps", EPSILON)
  _only(given, "cross_attention_dim", width)
  sizes = given["use_additional_conditions"]
  if given["sample_size"] == 128 if sizes is None else sizes:
    raise UserError("a transformer with use_additional_conditions=True is not known: it is told "
                    "the pictures' sizes, as PixArt-alpha's at 1024 px; those of 256 and 512 px "
                    "are known")
  return {
    "modulation": "single", "classes": 0, "context_width": given["caption_channels"],
    "position_scale": float(given["interpolation_scale"] or max(given["sample_size"] // 64, 1)),
    "pooled_width": 0,
  }  # fmt: skip


_READERS: dict[str, Callable[[Mapping[str, Any], int], dict[str, Any]]] = {
  SD3: _sd3, DIT: _dit, PIXART: _pixart,
}


def to_diffusers(options: Options) -> dict[str, Any]:
  """A config.json.

  Raises:
    UserError: diffusers has no such transformer.
  """
  if options["mlp_ratio"] != MLP_RATIO:
    raise UserError(f"diffusers has no transformer with mlp_ratio={options['mlp_ratio']}, only "
                    f"with {MLP_RATIO:g}")
  shared = {
    "patch_size": options["patch"], "num_layers": options["depth"],
    "attention_head_dim": options["width"] // options["heads"],
    "num_attention_heads": options["heads"], "in_channels": options["in_channels"],
    "out_channels": options["out_channels"], "sample_size": options["resolution"],
  }  # fmt: skip
  if "largest" in options:
    if options["grid"] * options["patch"] != options["resolution"]:
      raise UserError(f"diffusers has no transformer with grid={options['grid']} at a latent side "
                      f"of {options['resolution']}, only with {options['resolution']} / patch")
    return {
      "_class_name": SD3, **shared, "caption_projection_dim": options["width"],
      "joint_attention_dim": options["context_width"],
      "pooled_projection_dim": options["pooled_width"], "pos_embed_max_size": options["largest"],
      "dual_attention_layers": list(range(options["dual"])),
      "qk_norm": "rms_norm" if options["norm"] else None,
    }  # fmt: skip
  if options["pooled_width"] or (options["classes"] and options["context_width"]):
    raise UserError("diffusers has no transformer of this kind that is told a text's vector, or "
                    "both a text and labels")
  if options["modulation"] == "single" and options["context_width"]:
    return {
      "_class_name": PIXART, **shared, "norm_type": "ada_norm_single", "norm_eps": EPSILON,
      "cross_attention_dim": options["width"], "caption_channels": options["context_width"],
      "interpolation_scale": options["position_scale"], "use_additional_conditions": False,
    }  # fmt: skip
  if options["modulation"] == "zero" and options["classes"] and options["position_scale"] == 1:
    return {
      "_class_name": DIT, **shared, "norm_type": "ada_norm_zero", "norm_eps": EPSILON,
      "num_embeds_ada_norm": options["classes"],
    }
  raise UserError("diffusers has no such transformer: it has DiT's, told labels and modulated "
                  "block by block, and PixArt-alpha's, which attends to a text and is modulated "
                  "all at once")


def _only(given: Mapping[str, Any], name: str, *known: Any) -> None:
  if given[name] not in known:
    raise UserError(f"a transformer with {name}={given[name]} is not known, only with "
                    f"{' or '.join(map(str, known))}")
