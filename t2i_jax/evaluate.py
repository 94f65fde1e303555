"""`python -m t2i_jax.evaluate --export=DIR`: what exports are worth on data they never saw."""

import argparse

from t2i_jax import command


class ListMetrics(argparse.Action):
  """Prints the metrics, as `--help` does its text, and ends the command."""

  def __call__(self, parser, namespace, values, option_string=None):
    from t2i_jax.evaluation.scoring import listing

    print(listing())
    parser.exit()


def main(argv: list[str] | None = None) -> None:
  """The command; see `--help`."""
  parser = command.parser(
    "t2i_jax.evaluate",
    "Draws pictures from exports and measures them, or, of first stages, encodes and decodes real\n"
    "ones and compares. By default it is the held-out loss and, on data sets with a verifier, how\n"
    "many pictures are right, by attribute, for their captions and for shuffled ones (which must\n"
    "collapse: if they do not, the model ignores the text); of first stages PSNR, SSIM and their\n"
    "latents. Metrics of public networks need their files, --network=KIND=FILE; without any,\n"
    "those of a feature_net export stand in. A command that was interrupted goes on when it is\n"
    "given again with the same --output, to the same numbers.",
    "python -m t2i_jax.evaluate --export=runs/quickstart/export",
    "python -m t2i_jax.evaluate --export=DIR --split=held_out_pairs --pictures=1024 --guidance=3",
    "python -m t2i_jax.evaluate --export=DIR --metric=fd_feature_net --metric=verifier "
    "--network=feature-net=runs/feature_net/export --sweep=guidance=1,2,4 --sweep=steps=10,25 "
    "--output=scores",
    "python -m t2i_jax.evaluate --export=DIR --metric=fid --network=inception=pt_inception.pth "
    "--pictures=30000 --reference=coco.npz --output=scores",
    "python -m t2i_jax.evaluate --export=gan=runs/gan/export --export=ddpm=runs/ddpm/export "
    "--each=4 --metric=verifier --metric=feature_net_diversity --output=compared",
    "python -m t2i_jax.evaluate --export=DIR --prompts=evaluation_metadata.jsonl --each=4 "
    "--geneval=for-geneval --output=drawn",
    "python -m t2i_jax.evaluate --export=runs/autoencoder/export --metric=rfid --metric=psnr "
    "--metric=ssim --metric=lpips_distance --network=inception=pt_inception.pth "
    "--network=lpips-vgg=lpips --data=coco --split=val --pictures=5000 --output=reconstructed",
  )
  from t2i_jax.sample import add_export_flags

  add_export_flags(parser, several=True)
  parser.add_argument("--split", action="append", default=[],
                      help="a split; may be repeated; by default the run's evaluate.splits, or all "
                      "held-out ones")
  parser.add_argument("--prompts", metavar="FILE",
                      help="prompts in place of a split's captions: a line each, or a .tsv "
                      "(PartiPrompts) or .jsonl file (GenEval)")
  parser.add_argument("--pictures", type=int,
                      help="drawn of a split (256), or of the prompts (all)")
  parser.add_argument("--each", type=int, default=1, help="pictures of each caption (1)")
  parser.add_argument("--metric", action="append", default=[], metavar="NAME",
                      help="what to measure; may be repeated; loss, verifier, or one of "
                      "--list-metrics; by default loss and verifier where there are")
  parser.add_argument("--list-metrics", action=ListMetrics, nargs=0,
                      help="print all metrics, and the kinds of networks, and stop")
  parser.add_argument("--network", action="append", default=[], metavar="KIND=FILE",
                      help="a network that metrics need; --list-metrics names the kinds")
  parser.add_argument("--resize", default="clean", metavar="clean|tf1|torch",
                      help="how pictures are resized for Inception (clean)")
  parser.add_argument("--reference", action="append", default=[], metavar="SPLIT|FILE.npz",
                      help="real pictures to compare with: a split's, or stored statistics (one "
                      "file a network); by default those of the split that is drawn")
  parser.add_argument("--reference-pictures", type=int,
                      help="real pictures of a split (as many as are drawn)")
  parser.add_argument("--save-reference", default="", metavar="FILE.npz",
                      help="keep the real pictures' statistics in a file")
  parser.add_argument("--reference-only", action="store_true",
                      help="measure the real pictures and stop")
  parser.add_argument("--sweep", action="append", default=[], metavar="NAME=V1,V2,...",
                      help="a sampling option to vary; several span a grid")
  parser.add_argument("--data", default="", metavar="NAME",
                      help="another data set than the training run's, such as coco; that of a "
                      "converted model is folder")
  parser.add_argument("--resolution", type=int, metavar="PIXELS",
                      help="side of the pictures that first stages are given (that of their "
                      "training)")
  parser.add_argument("--data-option", action="append", default=[], metavar="NAME=VALUE",
                      help="an option of the data set in place of the training run's")
  parser.add_argument("--output", default="",
                      help="folder for scores.json, report.html, plots, and all pictures and "
                      "states that are needed to go on")
  parser.add_argument("--geneval", default="", metavar="FOLDER",
                      help="write the pictures as GenEval's scripts read them")
  command.run(parser, argv, _evaluate)


def _evaluate(flags) -> None:
  command.set_up_jax()
  from t2i_jax.evaluation.run import evaluate

  evaluate(flags)


if __name__ == "__main__":
  main()
