"""What chips send each other, counted in a program as the TPU's compiler writes them."""

from pathlib import Path

from t2i_jax.planning.collectives import Traffic, traffic

PROGRAM = (Path(__file__).parent / "program.hlo").read_text()


def test_every_collective_counts_as_often_as_it_runs():
  found = traffic(PROGRAM, 8)
  assert found == {
    # 24 turns of a loop, each gathering 64 x 16 bfloat16, 7/8 of which come from others.
    "all-gather": Traffic(24, 24 * 2048, 24 * 1792),
    # Two numbers of groups of four: to all and back.
    "all-reduce": Traffic(1, 20, 30),
    "collective-permute": Traffic(1, 24, 24),
    "reduce-scatter": Traffic(1, 64 * 128 * 4, 7 * 64 * 128 * 4 // 8),
  }


def test_a_loop_that_does_not_say_how_often_it_runs_counts_to_its_limit():
  said = ', backend_config={"known_trip_count":{"n":"24"}}'
  assert said in PROGRAM and "constant(24)" in PROGRAM
  assert traffic(PROGRAM.replace(said, ""), 8) == traffic(PROGRAM, 8)


def test_a_program_of_one_chip_sends_nothing():
  alone = "ENTRY %main (x: f32[2]) -> f32[2] {\n  ROOT %x = f32[2]{0} parameter(0)\n}"
  assert traffic(alone, 1) == {}
