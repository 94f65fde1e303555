import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from t2i_jax import config as configs
from t2i_jax import config_files, durations, recipe
from t2i_jax.errors import UserError

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "configs" / "quickstart.py")


def loaded(**overrides):
  return config_files.load_config(f"{QUICKSTART}:size=tiny", overrides)


def overridden(key, text):
  config = loaded()
  config_files.override(config, key, text)
  return configs.flatten(config)[key]


@pytest.mark.parametrize("arg, message", [
  ("sise=tiny", "unknown config argument 'sise'; did you mean 'size'?"),
  ("size=tinny", "unknown size 'tinny'; did you mean 'tiny'?"),
  ("dataset=emojis", "unknown dataset 'emojis'; did you mean 'emoji'?"),
  ("tiny", "config argument 'tiny' is not key=value; keys: size, dataset"),
  ("size=tiny,size=small", "config argument 'size' is given twice"),
])
def test_a_wrong_argument_names_what_is_right(arg, message):
  with pytest.raises(UserError) as error:
    config_files.load_config(f"{QUICKSTART}:{arg}")
  assert str(error.value) == message


def test_arguments_take_the_type_of_their_default():
  arg = configs.parse_arg("steps=3,rate=1,flip=true,name=7", steps=1, rate=0.5, flip=False,
                          name="x", rest=4)
  assert arg.to_dict() == {"steps": 3, "rate": 1.0, "flip": True, "name": "7", "rest": 4}
  assert isinstance(arg.rate, float)
  assert configs.parse_arg(None, size="a").size == "a"
  assert configs.parse_arg("", size="a").size == "a"
  with pytest.raises(UserError, match="config argument steps=x: expected int, such as 1"):
    configs.parse_arg("steps=x", steps=1)


@pytest.mark.parametrize("key, nearest", [
  ("optimiser.learning_rate", "optimizer.learning_rate"),
  ("learning_rate", "optimizer.learning_rate"),
  ("model.chanels", "model.channels"),
  ("data.options.level", "data.options.levels"),
  ("train.batchsize", "train.batch_size"),
  ("model.solver", "sample.options.solver"),
])
def test_an_unknown_key_names_the_nearest(key, nearest):
  with pytest.raises(UserError) as error:
    loaded(**{key: "1"})
  assert str(error.value) == f"unknown config key '{key}'; did you mean '{nearest}'?"


def test_configs_are_locked():
  config = loaded()
  with pytest.raises(KeyError):
    config.train.update(batchsize=3)
  with pytest.raises(AttributeError):
    config.model.chanels = 3
  with pytest.raises(TypeError):
    config.train.batch_size = "many"


@pytest.mark.parametrize("key, text, value", [
  ("train.batch_size", "64", 64),
  ("optimizer.learning_rate", "3e-4", 3e-4),
  ("optimizer.learning_rate", "1", 1.0),
  ("ema.warmup", "False", False),
  ("ema.warmup", "false", False),
  ("model.schedule", "linear", "linear"),
  ("model.schedule", "3", "3"),
  ("model.multipliers", "1,2,4", (1, 2, 4)),
  ("model.multipliers", "(1, 2)", (1, 2)),
  ("model.multipliers", "[3]", (3,)),
  ("model.multipliers", "3", (3,)),
  ("data.options.levels", "one,two", ("one", "two")),
  ("data.options.levels", "two", ("two",)),
  ("sample.prompts", "a cat, a dog", ("a cat", "a dog")),
  ("sample.prompts", "'a big, red dog'", ("a big, red dog",)),
  ("sample.prompts", "['a, b', 'c']", ("a, b", "c")),
  ("sample.prompts", "1, 2", ("1", "2")),
  ("optimizer.multipliers", "(('text', 0.1),)", (("text", 0.1),)),
  ("sharding.rules", "[('kernel', 'tensor(-1)'), ('.*', 'replicate')]",
   (("kernel", "tensor(-1)"), (".*", "replicate"))),
  ("train.duration", "100", 100),
  ("train.duration", "1.5M examples", "1.5M examples"),
  ("log.every", "5%", "5%"),
])
def test_overrides_keep_the_type(key, text, value):
  result = overridden(key, text)
  assert result == value and type(result) is type(value)
  if isinstance(value, tuple):
    assert [type(part) for part in result] == [type(part) for part in value]


@pytest.mark.parametrize("key, text, message", [
  ("train.batch_size", "many", "config key train.batch_size=many: expected int, such as 8"),
  ("train.batch_size", "8.5", "expected int"),
  ("train.batch_size", "True", "expected int"),
  ("optimizer.learning_rate", "fast", "expected float, such as 0.003"),
  ("optimizer.learning_rate", "1e999", "expected float"),
  ("ema.warmup", "1", "expected bool"),
  ("model.multipliers", "1,x", "config key model.multipliers=x: expected int, such as 1"),
  ("model.multipliers", "wide", "expected int"),
  ("train.batch_size", "{[]: 1}", "expected int"),
  ("train.duration", "²", "is not a duration"),
  ("train", "3", "config key 'train' is a section; set one of its keys: train.accumulate"),
  ("components", "3", "config key 'components' is a section; set one of its keys: components.NAME"),
  ("players.denoiser", "3", "unknown config key 'players.denoiser'"),
])
def test_values_of_another_type_are_errors(key, text, message):
  with pytest.raises(UserError) as error:
    loaded(**{key: text})
  assert message in str(error.value)


@pytest.mark.parametrize("key, text, message", [
  ("seed", "-1", "config key seed=-1 is out of range; set 0 to 4294967295"),
  ("seed", str(2**32), "out of range"),
  ("train.accumulate", "0", "config key train.accumulate=0 is out of range; set at least 1"),
  ("data.prefetch", "0", "set at least 1"),
  ("checkpoint.keep_last", "0", "set at least 1"),
  ("ema.decay", "1.5", "set 0 to 1"),
  ("sample.count", "0", "set at least 1"),
])
def test_numbers_that_make_no_sense_are_errors(key, text, message):
  with pytest.raises(UserError) as error:
    loaded(**{key: text})
  assert message in str(error.value)


def test_sections_whose_keys_are_the_users_take_new_ones():
  config = loaded(**{"components.first_stage": "runs/vae/export",
                     "players.denoiser.learning_rate": "1e-5",
                     "players.denoiser.warmup": "5%",
                     "players.text.warmup": "3"})
  assert config.components.first_stage == "runs/vae/export"
  assert config.players.to_dict() == {
    "denoiser": {"learning_rate": 1e-5, "warmup": "5%"}, "text": {"warmup": 3}
  }
  assert config.is_locked
  for key, text, message in (
    ("players.denoiser.rate", "1", "unknown optimizer option 'rate'"),
    ("players.denoiser.learning_rate", "x", "expected float"),
    ("players.denoiser.warmup", "soon", "players.denoiser.warmup='soon' is not a duration"),
    ("players.denoiser.a.b", "1", "write players.PLAYER.OPTION"),
  ):
    with pytest.raises(UserError) as error:
      loaded(**{key: text})
    assert message in str(error.value)


@pytest.mark.parametrize("value, steps", [
  (0, 0), (7, 7), ("2000 steps", 2000), ("1 step", 1), ("2k steps", 2000), ("1.5M steps", 1500000),
  ("2B steps", 2 * 10**9), ("0 steps", 0), ("0%", 0),
  ("3 epochs", 300), ("1 epoch", 100), ("0.5 epochs", 50), ("0.001 epochs", 1),
  ("640 examples", 20), ("1 example", 1), ("6.4k examples", 200), ("3.2M examples", 100000),
  ("5%", 50), ("100%", 1000), ("0.01%", 1), ("2.5 %", 25), (" 10% ", 100),
])
def test_durations(value, steps):
  result = durations.steps_of(value, "x.every", batch_size=32, epoch_size=3200, total=1000)
  assert result == steps and isinstance(result, int)


@pytest.mark.parametrize("value", [
  "", "soon", "5", "5 minutes", "steps", "5steps", "-5 steps", "5 k steps", "2 steps more", "%",
  "-1%", "nan steps", "inf steps", "1e999 epochs", "M steps", "5K steps", -3, 2.5, True, None,
])
def test_what_is_no_duration(value):
  with pytest.raises(UserError, match="^x.every=.* is not a duration; write steps as an integer"):
    durations.steps_of(value, "x.every", batch_size=32, epoch_size=3200, total=1000)


def test_units_that_have_no_meaning_here():
  with pytest.raises(UserError, match="run's own length cannot be a percentage"):
    durations.steps_of("50%", "train.duration", 32, 3200)
  with pytest.raises(UserError, match="made on the fly and has no epochs; use steps or examples"):
    durations.steps_of("2 epochs", "train.duration", 32, None)
  with pytest.raises(UserError, match="more than the whole run"):
    durations.steps_of("101%", "log.every", 32, None, 1000)


def test_every_duration_key_exists_and_is_read_as_one():
  config = loaded()
  flat = configs.flatten(config)
  for key in config_files.DURATIONS:
    assert key in flat
    durations.parse_duration(flat[key], key)
    with pytest.raises(UserError, match=f"{key}='often' is not a duration"):
      config_files.override(config, key, "often")


def test_json_keeps_everything():
  config = loaded(**{"sharding.rules": "(('a', 'tensor(0)'), ('.*', 'fsdp'))",
                     "components.guide": "x", "players.denoiser.b2": "0.5", "train.duration": "9"})
  text = configs.to_json(config)
  again = configs.from_json(text)
  assert again.to_dict() == config.to_dict()
  assert configs.to_json(again) == text
  assert json.loads(text)["sharding"]["rules"][0] == ["a", "tensor(0)"]
  assert isinstance(again, ConfigDict) and isinstance(again.sharding.rules[0], tuple)
  for wrong in ("", "[]", "3", "{"):
    with pytest.raises(ValueError):
      configs.from_json(wrong)


def test_flatten_leaves_out_empty_sections():
  assert configs.flatten({"a": {"b": {"c": 1}, "d": {}}, "e": (1,)}) == {"a.b.c": 1, "e": (1,)}


def write(folder, text):
  path = folder / "mine.py"
  path.write_text(text)
  return str(path)


@pytest.mark.parametrize("text, message", [
  ("x = 1", "has no get_config(arg), so it is not a config"),
  ("def get_config(arg):\n  return None", "get_config returns no config that begins as"),
  ("def get_config(arg)\n", "mine.py: SyntaxError:"),
  ("import json\n\n1 / 0", "mine.py, line 3: ZeroDivisionError: division by zero"),
  ("from t2i_jax import recipe\ndef get_config(arg):\n  c = recipe.base('ddpm', 'scenes')\n"
   "  c.model.chanels = 3\n  return c", "mine.py, line 4: AttributeError"),
  ("from t2i_jax import recipe\ndef get_config(arg):\n  return recipe.base('ddmp', 'scenes')",
   "unknown system 'ddmp'; did you mean 'ddpm'?"),
])
def test_a_config_file_that_is_none(text, message, tmp_path):
  with pytest.raises(UserError) as error:
    config_files.load_config(write(tmp_path, text))
  assert message in str(error.value)


def test_files_that_are_not_there_or_not_python(tmp_path):
  with pytest.raises(UserError, match=r"no config file at '.*quickstat.py'; did you mean '.*quick"):
    config_files.load_config(QUICKSTART.replace("quickstart", "quickstat"))
  with pytest.raises(UserError, match="no config file at 'nowhere/x.py'"):
    config_files.load_config("nowhere/x.py")
  other = tmp_path / "config.txt"
  other.write_text("")
  with pytest.raises(UserError, match="is no Python file"):
    config_files.load_config(str(other))


def test_base_takes_the_captions_of_the_data_set_into_account():
  one, emoji = recipe.base("ddpm", "scenes"), recipe.base("ddpm", "emoji")
  assert one.data.name == "scenes" and one.data.options.levels == ("one",)
  assert recipe.base("ddpm", "scenes_two").data.options.levels == ("two",)
  assert emoji.data.name == "emoji" and emoji.text.vocab_size > one.text.vocab_size
  assert one.is_locked and emoji.is_locked
