"""Key maps of text encoders: transformers' names on the other side, or their authors' own.

Paths are those of the parameters of the networks in `t2i_jax/text/`.
"""

from t2i_jax.weights.key_map import KeyMap
from t2i_jax.weights.rules import Rule, conv, conv_1d, dense, linear, norm

PROJECTIONS = (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out"))


def _clip_layers(ours: str, theirs: str) -> list[Rule]:
  layer, of = f"{ours}layers_{{i}}", f"{theirs}.encoder.layers.{{i}}"
  rules = []
  for our, their in PROJECTIONS:
    rules += dense(f"{layer}/attention/{our}", f"{of}.self_attn.{their}_proj")
  for our, their in (("mlp_in", "mlp.fc1"), ("mlp_out", "mlp.fc2")):
    rules += dense(f"{layer}/{our}", f"{of}.{their}")
  for our, their in (("norm_attention", "layer_norm1"), ("norm_mlp", "layer_norm2")):
    rules += norm(f"{layer}/{our}", f"{of}.{their}")
  return rules


def _clip_text(ours: str = "") -> list[Rule]:
  return [
    Rule(f"{ours}tokens/embedding", "text_model.embeddings.token_embedding.weight"),
    Rule(f"{ours}positions", "text_model.embeddings.position_embedding.weight"),
    *_clip_layers(ours, "text_model"),
    *norm(f"{ours}norm_out", "text_model.final_layer_norm"),
    *dense(f"{ours}projection", "text_projection", bias=False),
  ]


def _clip_vision(ours: str = "") -> list[Rule]:
  return [
    Rule(f"{ours}class", "vision_model.embeddings.class_embedding"),
    Rule(f"{ours}patches/kernel", "vision_model.embeddings.patch_embedding.weight", conv),
    Rule(f"{ours}positions", "vision_model.embeddings.position_embedding.weight"),
    # Misspelt in every file.
    *norm(f"{ours}norm_in", "vision_model.pre_layrnorm"),
    *_clip_layers(ours, "vision_model"),
    *norm(f"{ours}norm_out", "vision_model.post_layernorm"),
    *dense(f"{ours}projection", "visual_projection", bias=False),
  ]


_POSITIONS = r"position_ids$"
# A tower alone is also read from a file of both, and from transformers 5's, without the prefix.
CLIP_TEXT = KeyMap(
  _clip_text(), [_POSITIONS, "^vision_model", "^visual_projection", "^logit_scale$"],
  [("text_model.", "")],
)
CLIP_VISION = KeyMap(
  _clip_vision(), [_POSITIONS, "^text_model", "^text_projection", "^logit_scale$"],
  [("vision_model.", "")],
)
CLIP = KeyMap(
  [*_clip_text("text/"), *_clip_vision("vision/"), Rule("logit_scale", "logit_scale")],
  [_POSITIONS],
)



def _open_clip_layers(ours: str, theirs: str) -> list[Rule]:
  layer, of = f"{ours}layers_{{i}}", f"{theirs}.resblocks.{{i}}"
  rules = []
  # The three projections are one matrix there.
  for index, our in enumerate(("query", "key", "value")):
    rules += [
      Rule(f"{layer}/attention/{our}/kernel", f"{of}.attn.in_proj_weight", linear, (index, 3)),
      Rule(f"{layer}/attention/{our}/bias", f"{of}.attn.in_proj_bias", part=(index, 3)),
    ]
  rules += dense(f"{layer}/attention/out", f"{of}.attn.out_proj")
  for our, their in (("mlp_in", "mlp.c_fc"), ("mlp_out", "mlp.c_proj")):
    rules += dense(f"{layer}/{our}", f"{of}.{their}")
  for our, their in (("norm_attention", "ln_1"), ("norm_mlp", "ln_2")):
    rules += norm(f"{layer}/{our}", f"{of}.{their}")
  return rules


def _open_clip_text(ours: str = "") -> list[Rule]:
  return [
    Rule(f"{ours}tokens/embedding", "token_embedding.weight"),
    Rule(f"{ours}positions", "positional_embedding"),
    *_open_clip_layers(ours, "transformer"),
    *norm(f"{ours}norm_out", "ln_final"),
    Rule(f"{ours}projection/kernel", "text_projection"),
  ]


def _open_clip_vision(ours: str = "") -> list[Rule]:
  return [
    Rule(f"{ours}class", "visual.class_embedding"),
    Rule(f"{ours}patches/kernel", "visual.conv1.weight", conv),
    Rule(f"{ours}positions", "visual.positional_embedding"),
    *norm(f"{ours}norm_in", "visual.ln_pre"),
    *_open_clip_layers(ours, "visual.transformer"),
    *norm(f"{ours}norm_out", "visual.ln_post"),
    Rule(f"{ours}projection/kernel", "visual.proj"),
  ]


# OpenAI's own files and OpenCLIP's, whose names are the same.
_SETTINGS = r"^(module\.)?(input_resolution|context_length|vocab_size|attn_mask)$"
_SHARDED = [("", "module.")]  # of a model that was trained on several devices
OPEN_CLIP_TEXT = KeyMap(
  _open_clip_text(), [_SETTINGS, r"^(module\.)?visual\.", r"^(module\.)?logit_scale$"], _SHARDED
)
OPEN_CLIP_VISION = KeyMap(
  _open_clip_vision(),
  [_SETTINGS, r"^(transformer|token_embedding|ln_final)\.",
   "^(positional_embedding|text_projection|logit_scale)$"],
)  # fmt: skip
OPEN_CLIP = KeyMap(
  [*_open_clip_text("text/"), *_open_clip_vision("vision/"), Rule("logit_scale", "logit_scale")],
  [_SETTINGS], _SHARDED,
)  # fmt: skip

T5 = KeyMap(
  [
    Rule("tokens/embedding", "shared.weight"),
    Rule("positions/embedding",
         "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    *[
      rule for our, their in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))
      for rule in dense(f"layers_{{i}}/attention/{our}",
                        f"encoder.block.{{i}}.layer.0.SelfAttention.{their}", bias=False)
    ],
    Rule("layers_{i}/norm_attention/scale", "encoder.block.{i}.layer.0.layer_norm.weight"),
    *[
      rule for our, their in (("mlp_in", "wi"), ("mlp_gate", "wi_0"), ("mlp_value", "wi_1"),
                              ("mlp_out", "wo"))
      for rule in dense(f"layers_{{i}}/{our}",
                        f"encoder.block.{{i}}.layer.1.DenseReluDense.{their}", bias=False)
    ],
    Rule("layers_{i}/norm_mlp/scale", "encoder.block.{i}.layer.1.layer_norm.weight"),
    Rule("norm_out/scale", "encoder.final_layer_norm.weight"),
  ],
  # The embeddings under another name, and the half that writes text.
  [r"^encoder\.embed_tokens\.weight$", r"^decoder\.", r"^lm_head\."],
)  # fmt: skip

_BERT_LAYER = "encoder.layer.{i}"
BERT = KeyMap(
  [
    Rule("tokens/embedding", "embeddings.word_embeddings.weight"),
    Rule("positions", "embeddings.position_embeddings.weight"),
    Rule("segments", "embeddings.token_type_embeddings.weight"),
    *norm("norm_in", "embeddings.LayerNorm"),
    *[
      rule for name in ("query", "key", "value")
      for rule in dense(f"layers_{{i}}/attention/{name}", f"{_BERT_LAYER}.attention.self.{name}")
    ],
    *dense("layers_{i}/attention/out", f"{_BERT_LAYER}.attention.output.dense"),
    *norm("layers_{i}/norm_attention", f"{_BERT_LAYER}.attention.output.LayerNorm"),
    *dense("layers_{i}/mlp_in", f"{_BERT_LAYER}.intermediate.dense"),
    *dense("layers_{i}/mlp_out", f"{_BERT_LAYER}.output.dense"),
    *norm("layers_{i}/norm_mlp", f"{_BERT_LAYER}.output.LayerNorm"),
    *dense("pooled", "pooler.dense"),
  ],
  [_POSITIONS, r"^cls\.", r"^pooler\."],
  [("", "bert.")],
)  # fmt: skip

# Latent diffusion's, under the names of diffusers' LDMBertModel.
LDM_TEXT = KeyMap(
  [
    Rule("tokens/embedding", "model.embed_tokens.weight"),
    Rule("positions", "model.embed_positions.weight"),
    *[
      rule for our, their in (("query", "q"), ("key", "k"), ("value", "v"))
      for rule in dense(f"layers_{{i}}/attention/{our}",
                        f"model.layers.{{i}}.self_attn.{their}_proj", bias=False)
    ],
    *dense("layers_{i}/attention/out", "model.layers.{i}.self_attn.out_proj"),
    *norm("layers_{i}/norm_attention", "model.layers.{i}.self_attn_layer_norm"),
    *dense("layers_{i}/mlp_in", "model.layers.{i}.fc1"),
    *dense("layers_{i}/mlp_out", "model.layers.{i}.fc2"),
    *norm("layers_{i}/norm_mlp", "model.layers.{i}.final_layer_norm"),
    *norm("norm_out", "model.layer_norm"),
  ],
  [_POSITIONS, r"^to_logits\."],
)  # fmt: skip


def ldm_text_map(layers: int) -> KeyMap:
  """The same under its authors' names, which number attentions and MLPs one after the other."""
  rules = [
    Rule("tokens/embedding", "token_emb.weight"), Rule("positions", "pos_emb.emb.weight"),
    *norm("norm_out", "norm"),
  ]
  for i in range(layers):
    ours = f"layers_{i}"
    attention, mlp = (f"attn_layers.layers.{2 * i + j}" for j in range(2))
    for name in ("query", "key", "value"):
      rules += dense(f"{ours}/attention/{name}", f"{attention}.1.to_{name[0]}", bias=False)
    rules += [
      *norm(f"{ours}/norm_attention", f"{attention}.0"), *norm(f"{ours}/norm_mlp", f"{mlp}.0"),
      *dense(f"{ours}/attention/out", f"{attention}.1.to_out"),
      *dense(f"{ours}/mlp_in", f"{mlp}.1.net.0.0"), *dense(f"{ours}/mlp_out", f"{mlp}.1.net.2"),
    ]
  return KeyMap(rules, [r"^to_logits\."])


def _char_cnn_rnn(dot: str) -> KeyMap:
  rules = []
  for i in (1, 2, 3):
    rules += [Rule(f"conv_{i}/kernel", f"conv{i}{dot}weight", conv_1d),
              Rule(f"conv_{i}/bias", f"conv{i}{dot}bias")]
  for gate in ("", "_update", "_reset"):
    given, state = f"rnn{dot}i2h{gate}{dot}", f"rnn{dot}h2h{gate}{dot}"
    rules += [Rule(f"input{gate}/kernel", f"{given}weight", linear),
              Rule(f"input{gate}/bias", f"{given}bias"),
              Rule(f"state{gate}_kernel", f"{state}weight", linear),
              Rule(f"state{gate}_bias", f"{state}bias")]
  rules += [Rule("projection/kernel", f"emb_proj{dot}weight", linear),
            Rule("projection/bias", f"emb_proj{dot}bias")]
  return KeyMap(rules)


# The module's names in PyTorch, and those of the files that were extracted from Torch 7's.
CHAR_CNN_RNN, CHAR_CNN_RNN_EXTRACTED = _char_cnn_rnn("."), _char_cnn_rnn("_")


def _lstm(ours: str, theirs: str) -> list[Rule]:
  # PyTorch keeps the gates in our order, and two biases.
  return [
    Rule(f"input{ours}/kernel", f"rnn.weight_ih_l0{theirs}", linear),
    Rule(f"recurrent{ours}", f"rnn.weight_hh_l0{theirs}", linear),
    Rule(f"input{ours}/bias", f"rnn.bias_ih_l0{theirs}", plus=f"rnn.bias_hh_l0{theirs}"),
  ]


# Under the names of AttnGAN's text encoder; of one direction or both.
LSTM = KeyMap([
  Rule("tokens/embedding", "encoder.weight"), *_lstm("", ""), *_lstm("_reverse", "_reverse"),
])  # fmt: skip
