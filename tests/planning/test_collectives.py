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


FUSED = """
%wrapped_compare (turn.1: s32[], limit.1: s32[]) -> pred[] {
  %turn.1 = s32[]{:T(128)} parameter(0)
  %limit.1 = s32[]{:T(128)S(6)} parameter(1)
  ROOT %less.1 = pred[]{:T(512)} compare(%turn.1, %limit.1), direction=LT
}

%condition (p: (s32[], bf16[8,16])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element((s32[], bf16[8,16]) %p), index=0
  %limit = s32[]{:T(128)} constant(24)
  %kept = s32[]{:T(128)S(6)} copy(%limit)
  ROOT %less = pred[]{:T(512)} fusion(s32[]{:T(128)} %turn, s32[]{:T(128)S(6)} %kept), kind=kLoop, calls=%wrapped_compare
}
"""  # noqa: E501


def fused(program):
  """The program, with the comparison of its loop's condition in a fusion."""
  start = program.index("%condition (")
  end = program.index("}\n", start) + 2
  changed = program[:start] + FUSED.lstrip() + program[end:]
  return changed.replace(', backend_config={"known_trip_count":{"n":"24"}}', "")


def test_the_limit_of_a_loop_is_found_in_a_fusion_that_its_condition_calls():
  program = fused(PROGRAM)
  assert "known_trip_count" not in program
  assert traffic(program, 8) == traffic(PROGRAM, 8)
  inside = program.replace("parameter(1)\n", "constant(24)\n").replace(", %limit.1: s32[]", "")
  assert traffic(inside, 8) == traffic(PROGRAM, 8)
  swapped = program.replace("compare(%turn.1, %limit.1), direction=LT",
                            "compare(%limit.1, %turn.1), direction=GT")
  assert traffic(swapped, 8) == traffic(PROGRAM, 8)


def test_a_loop_that_asks_for_more_than_a_limit_counts_once():
  other = "  %other = pred[]{:T(512)} compare(%turn, %limit), direction=NE\n"
  twice = fused(PROGRAM).replace("  ROOT %less =", f"{other}  ROOT %less =")
  assert traffic(twice, 8)["all-gather"] == Traffic(1, 2048, 1792)


def test_a_program_of_one_chip_sends_nothing():
  alone = "ENTRY %main (x: f32[2]) -> f32[2] {\n  ROOT %x = f32[2]{0} parameter(0)\n}"
  assert traffic(alone, 1) == {}


def test_what_crosses_between_slices_is_counted_apart():
  """As the TPU's compiler writes it: a sum in a slice, and its parts exchanged by the hosts."""
  about = (
    'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_megascale_target="{SLICES}x{0:7}",_xla_megascale_transfer_type="KIND"}'
  )
  lines = [
    "%part = bf16[8,128]{1,0} reduce-scatter(bf16[64,128]{1,0} %x), replica_groups=[1,8]<=[8]",
    "%send.1 = (bf16[8,128]{1,0:T(8,128)(2,1)}, u32[], token[]) send(%part, %after), channel_id=2,"
    " is_host_transfer=true, " + about.replace("SLICES", "1,2").replace("KIND", "ALL_REDUCE"),
    "%send-done.1 = token[] send-done(%send.1), channel_id=2, " + about,
    "%recv.1 = (bf16[8,128]{1,0}, u32[], token[]) recv(%after), channel_id=1, "
    + about.replace("SLICES", "1,2").replace("KIND", "ALL_REDUCE"),
    "%send.2 = (f32[1,8]{1,0}, u32[], token[]) send(%few, %after), channel_id=4, "
    + about.replace("SLICES", "1:4").replace("KIND", "ALL_GATHER"),
  ]
  program = "ENTRY %main (x: f32[2]) -> f32[2] {\n" + "\n".join(lines) + "\n}"
  assert traffic(program, 8) == {
    "reduce-scatter": Traffic(1, 64 * 128 * 2, 7 * 64 * 128 * 2 // 8),
    # Half of a part to the other slice, and half of its sum.
    "all-reduce between slices": Traffic(1, 2048, network=2 * 2048 // 2),
    # Its own to each of three others.
    "all-gather between slices": Traffic(1, 4 * 32, network=3 * 32),
  }
