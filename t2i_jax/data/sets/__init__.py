"""Public data sets: how their downloads are read, prepared and trained on."""

import dataclasses
import importlib
from types import ModuleType

from t2i_jax.data.sets.listing import Reader
from t2i_jax.errors import unknown


@dataclasses.dataclass(frozen=True)
class Preparable:
  """A set that `t2i_jax.data.prepare` prepares.

  Attributes:
    module: with `ABOUT`, and `CLASSES` if it has classes.
    reader: name of the function in it that lists a download.
  """

  module: str
  reader: str = "read"

  def load(self) -> tuple[Reader, ModuleType]:
    """The function that lists a download, and its module."""
    module = importlib.import_module(f"t2i_jax.data.sets.{self.module}")
    return getattr(module, self.reader), module


PREPARABLE = {
  "coco": Preparable("coco", "read_2014"),
  "coco_2017": Preparable("coco", "read_2017"),
  "coco_karpathy": Preparable("coco", "read_karpathy"),
  "cub": Preparable("cub"),
  "flowers": Preparable("flowers"),
  "flickr30k": Preparable("flickr30k"),
  "visual_genome": Preparable("visual_genome"),
  "cc3m": Preparable("conceptual", "read_3m"),
  "cc12m": Preparable("conceptual", "read_12m"),
}


def preparable(name: str) -> Preparable:
  """The set of a name.

  Raises:
    UserError: there is none.
  """
  if name not in PREPARABLE:
    raise unknown("data set to prepare", name, (*PREPARABLE, "webdataset"))
  return PREPARABLE[name]
