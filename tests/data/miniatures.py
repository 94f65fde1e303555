"""The official layouts of public data sets, with a handful of pictures and their known traps."""

import io
import json
import tarfile
import zlib

from PIL import Image


def picture(path, number=0, size=(20, 16)):
  """A picture of a grey level that follows from its number."""
  path.parent.mkdir(parents=True, exist_ok=True)
  grey = 10 * number % 256
  Image.new("RGB", size, (grey, grey, grey)).save(path)


def write(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")


def coco(folder, year="2014", train=5, val=3):
  """MS COCO: ids from 100 (train) and 200 (val), five captions each, as the release writes them."""
  for split, count, first in (("train", train, 100), ("val", val, 200)):
    part, images, annotations = f"{split}{year}", [], []
    for n in range(first, first + count):
      name = f"COCO_{part}_{n:012d}.jpg" if year == "2014" else f"{n:012d}.jpg"
      picture(folder / part / name, n)
      images.append({"license": 5, "file_name": name, "height": 16, "width": 20, "id": n,
                     "coco_url": f"http://images.cocodataset.org/{part}/{name}",
                     "date_captured": "2013-11-14 17:02:52"})
      annotations += [{"image_id": n, "id": 10 * n + k, "caption": f"Picture {n}, caption {k}. "}
                      for k in range(5)]
    annotations[0]["caption"] = "A caption\nof two lines. "  # the release has such
    write(folder / "annotations" / f"captions_{part}.json",
          {"info": {}, "licenses": [], "images": images, "annotations": annotations[::-1]})
  return folder


def karpathy_entry(number, split, name, **more):
  """A picture of a file of Karpathy's."""
  return {"filename": name, "split": split, "imgid": number, "sentids": [number],
          "sentences": [{"tokens": ["picture"], "raw": f"Picture {number}, caption {k}.",
                         "imgid": number, "sentid": 5 * number + k} for k in range(5)], **more}


def coco_karpathy(folder):
  """MS COCO 2014 with `dataset_coco.json`; "restval" is of val2014."""
  coco(folder, "2014", train=2, val=3)
  entries = [karpathy_entry(n, split, f"COCO_{part}_{n:012d}.jpg", filepath=part, cocoid=n)
             for n, split, part in ((100, "train", "train2014"), (101, "train", "train2014"),
                                    (200, "val", "val2014"), (201, "test", "val2014"),
                                    (202, "restval", "val2014"))]
  write(folder / "dataset_coco.json", {"images": entries, "dataset": "coco"})
  return folder


BIRDS = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "200.Common_Yellowthroat")


def cub(folder):
  """Birds of three classes, the last one for testing, with a picture that is not listed."""
  birds, number = folder / "CUB_200_2011", 0
  lists = {name: "" for name in ("images", "image_class_labels", "bounding_boxes",
                                 "train_test_split")}
  for name in BIRDS:
    for n in range(2):
      number += 1
      file = f"{name}/{name[4:]}_{n:04d}_{number}.jpg"
      picture(birds / "images" / file, number, (40, 30))
      lists["images"] += f"{number} {file}\n"
      lists["image_class_labels"] += f"{number} {int(name[:3])}\n"
      lists["bounding_boxes"] += f"{number} 10.0 5.0 16.0 8.0\n"
      lists["train_test_split"] += f"{number} {n}\n"
      captions = [f"this bird {number} has feathers {k}" for k in range(10)]
      captions[3] = f"bird {number} is light\ufffd\ufffdbrown"  # what the published files have
      write(folder / "text_c10" / f"{file[:-4]}.txt", "\n".join(captions) + "\n")
  for name, text in lists.items():
    write(birds / f"{name}.txt", text)
  write(birds / "classes.txt", "".join(f"{int(name[:3])} {name}\n" for name in BIRDS))
  picture(birds / "images" / BIRDS[0] / "Black_footed_Albatross_0001_796111_rgb.jpg")
  write(folder / "trainvalclasses.txt", "".join(f"{name}\n" for name in BIRDS[:2]))
  write(folder / "testclasses.txt", f"{BIRDS[2]}\n")
  return folder


def flowers(folder):
  """Flowers of three classes, the last one for testing; pictures are in no order of classes."""
  from scipy.io import savemat

  labels = [77, 1, 102, 1, 102]
  for n, label in enumerate(labels, start=1):
    picture(folder / "jpg" / f"image_{n:05d}.jpg", n)
    write(folder / "text_c10" / f"class_{label:05d}" / f"image_{n:05d}.txt",
          "".join(f"flower {n} has petals {k}\n" for k in range(10)))
  savemat(folder / "imagelabels.mat", {"labels": [labels]})
  savemat(folder / "setid.mat", {"trnid": [[1]], "valid": [[2]], "tstid": [[3, 4, 5]]})
  write(folder / "trainclasses.txt", "class_00077\n")
  write(folder / "valclasses.txt", "class_00001\n")
  write(folder / "testclasses.txt", "class_00102\n")
  return folder


BROKEN_ROW = "2199200615.jpg"  # the published table has no second bar in its last row


def flickr30k(folder, form, count=70):
  """Flickr30k as "token", "csv" (the mirror, folder in folder) or "karpathy"."""
  names = [BROKEN_ROW, *(f"{1000000000 + n}.jpg" for n in range(1, count))]
  inner = {"token": "flickr30k-images", "csv": "flickr30k_images/flickr30k_images",
           "karpathy": "flickr30k-images"}[form]
  for n, name in enumerate(names):
    picture(folder / inner / name, n)
  rows = [(name, k, f"Picture {n} , caption {k} .") for n, name in enumerate(names)
          for k in range(5)]
  if form == "token":
    write(folder / "results_20130124.token", "".join(f"{a}#{k}\t{t}\n" for a, k, t in rows))
  elif form == "csv":
    text = "image_name| comment_number| comment\n"
    for name, k, caption in rows:
      bar = "  " if (name, k) == (BROKEN_ROW, 4) else "|"
      text += f"{name}| {k}{bar} {caption}\n"
    write(folder / "flickr30k_images" / "results.csv", text)
  else:
    splits = {0: "test", 1: "val"}
    write(folder / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": [
      karpathy_entry(n, splits.get(n, "train"), name) for n, name in enumerate(names)]})
  return folder


def visual_genome(folder, count=24):
  """Pictures 1 and on, the even ones in the second folder, of two regions and a broken one."""
  content = []
  for n in range(1, count + 1):
    file = folder / ("VG_100K" if n % 2 else "VG_100K_2") / f"{n}.jpg"
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (40, 20), (0, 0, 0))
    image.paste((250, 250, 250), (20, 0, 40, 20))
    image.save(file)
    regions = [(2 * n, "a black  half", 0, 0, 12, 12), (2 * n + 1, "the white half", 20, 0, 20, 20),
               (9000 + n, "a line", 40, 0, 0, 20)]
    content.append({"id": n, "regions": [
      {"region_id": r, "image_id": n, "phrase": text, "x": x, "y": y, "width": w, "height": h}
      for r, text, x, y, w, h in regions]})
  write(folder / "region_descriptions.json", content)
  return folder


def address(n):
  """Where a picture of Conceptual Captions was."""
  return f"https://pictures.example/{n}.jpg?size=large"


def conceptual(folder, form="row_crc", count=4):
  """CC3M and its download by igorbrigadir's script ("row_crc", "crc") or img2dataset ("files")."""
  for split, table, first in (("training", "Train_GCC-training.tsv", 0),
                              ("validation", "Validation_GCC-1.1.0-Validation.tsv", 100)):
    numbers = range(first, first + count)
    write(folder / table, "".join(f'a "picture {n}\t{address(n)}\n' for n in numbers))
    for row, n in enumerate(numbers[1:], start=1):  # the first is gone from the web
      download(folder / split, form, row, n)
  return folder


def conceptual_12m(folder, count=150):
  """CC12M, whose columns are the other way round."""
  write(folder / "cc12m.tsv", "".join(f"{address(n)}\ta picture {n}\n" for n in range(count)))
  for n in range(count):
    download(folder / "cc12m", "crc", n, n)
  return folder


def download(folder, form, row, n):
  """What a downloader leaves of one picture."""
  crc = zlib.crc32(address(n).encode())
  if form == "files":
    stem = folder / "00000" / f"{row:09d}"
    picture(stem.with_suffix(".jpg"), n)
    write(stem.with_suffix(".json"), {"url": address(n), "caption": f"a picture {n}",
                                      "status": "success", "key": f"{row:09d}"})
    return
  name = folder / (f"{row}_{crc}" if form == "row_crc" else str(crc))  # no ending
  picture(folder / "written.jpg", n)
  (folder / "written.jpg").rename(name)


def jpeg(number, size, original=None):
  """A picture's bytes; with `original`, padded with white to `size` as img2dataset pads."""
  image = Image.new("RGB", original or size, (10 * number % 200,) * 3)
  if original:
    scale = min(size[0] / original[0], size[1] / original[1])
    inner = image.resize((round(original[0] * scale), round(original[1] * scale)))
    image = Image.new("RGB", size, (255, 255, 255))
    image.paste(inner, ((size[0] - inner.width) // 2, (size[1] - inner.height) // 2))
  out = io.BytesIO()
  image.save(out, "JPEG", quality=95)
  return out.getvalue()


def add(archive, name, content):
  """A member of a tar archive."""
  info = tarfile.TarInfo(name)
  info.size = len(content)
  archive.addfile(info, io.BytesIO(content))


def img2dataset(folder, shards=2, count=5, border=False):
  """Tar shards; the last key of each could not be downloaded."""
  folder.mkdir(parents=True, exist_ok=True)
  for shard in range(shards):
    with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
      for n in range(count):
        number, key = shard * count + n, f"{shard:05d}{n:04d}"
        about = {"url": address(number), "caption": f"a picture {number}", "key": key,
                 "status": "success", "error_message": None, "width": 32, "height": 32,
                 "original_width": 64, "original_height": 32}
        if n == count - 1:
          about |= {"status": "failed_to_download", "width": None, "height": None}
        else:
          add(archive, f"{key}.jpg", jpeg(number, (32, 32), (64, 32) if border else None))
          add(archive, f"{key}.txt", about["caption"].encode())
        add(archive, f"{key}.json", json.dumps(about).encode())
    write(folder / f"{shard:05d}_stats.json", {"count": count})
  return folder
