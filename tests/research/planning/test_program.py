"""Collectives read from HLO: counted once, as often as their loop runs, whatever their form."""

import pytest

from research.planning.program import Collective, collectives, count

# What XLA writes for TPUs: an asynchronous gather in three parts, inside a loop of 5 rounds; an
# all-reduce that is a reduce-scatter; groups in three notations.
HLO = """
HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%fused_computation.1 (p: bf16[1,64,512]) -> (bf16[1,64,512], bf16[1,256,512]) {
  %all-gather.1 = bf16[1,256,512]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={1}
}

%async_collective_fusion.2 (p: bf16[1,64,512]) -> bf16[1,256,512] {
  %all-gather.2 = bf16[1,256,512]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={1}
}

%fused_computation.3 (p: bf16[1,64,512]) -> bf16[1,256,512] {
  %all-gather.3 = bf16[1,256,512]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={1}
}

%all-reduce-scatter.9.clone (i: f32[256,8], j: f32[16]) -> (f32[64,8], f32[4]) {
  %all-reduce.7 = (f32[256,8]{1,0:T(8,128)}, f32[16]{0}) all-reduce(%i, %j), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%body (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %async-collective-start = (bf16[1,64,512]{2,1,0}, bf16[1,256,512]{2,1,0}) fusion(%a), kind=kCustom, calls=%fused_computation.1
  %fusion.2 = bf16[1,256,512]{2,1,0} fusion(%b), kind=kOutput, calls=%async_collective_fusion.2
  %async-collective-done = bf16[1,256,512]{2,1,0} fusion(%c), kind=kCustom, calls=%fused_computation.3
  %fusion.4 = (f32[64,8]{1,0}, f32[4]{0}) fusion(%d, %e), kind=kCustom, calls=%all-reduce-scatter.9.clone
}

%condition (carry: (s32[], f32[8])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.5), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body
  %all-reduce.5 = f32[]{:T(128)} all-reduce(%s), channel_id=9, replica_groups=[1,8]<=[8], to_apply=%add
  %alone = f32[100]{0} all-reduce(%s), channel_id=10, replica_groups=[8,1]<=[8], to_apply=%add
  %scatter = f32[2,8]{1,0} reduce-scatter(%s), channel_id=11, replica_groups=[4,2]<=[8], dimensions={0}
  %permute = f32[4,8]{1,0} collective-permute(%s), channel_id=12, source_target_pairs={{0,1},{1,0}}
  %exchange = f32[16]{0} all-to-all(%s), channel_id=13, replica_groups={{0,1,2,3,4,5,6,7}}
}
"""  # noqa: E501


def test_each_is_counted_once_and_as_often_as_its_loop_runs():
    found = {c.shapes[0]: c for c in collectives(HLO, 8)}
    gather = found["bf16[1,256,512]"]
    assert gather[:5] == ("all-gather", 2 * 256 * 512, 4, 5, 1)
    assert gather.moved == 5 * 2 * 256 * 512 * 3 / 4
    fused = found["f32[256,8]"]
    assert fused[:5] == ("reduce-scatter", 4 * (256 * 8 + 16), 4, 5, 1)
    assert fused.shapes == ("f32[256,8]", "f32[16]")
    summed = found["f32[]"]
    assert summed[:5] == ("all-reduce", 4, 8, 1, 0)
    assert summed.moved == 2 * 4 * 7 / 8
    assert found["f32[2,8]"][:3] == ("reduce-scatter", 4 * 2 * 8 * 2, 2)
    assert found["f32[4,8]"].moved == 4 * 4 * 8
    assert found["f32[16]"][:3] == ("all-to-all", 64, 8)
    # of a group of one device nothing is sent
    assert "f32[100]" not in found
    assert count(list(found.values()), above=1000) == {"all-gather": 5, "reduce-scatter": 5}


def test_a_loop_of_unknown_length_is_an_error_and_not_a_guess():
    with pytest.raises(ValueError, match="in a loop of unknown length"):
        collectives(HLO.replace("constant(5)", "parameter(0)"), 8)
    known = HLO.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert count(collectives(known, 8))["all-gather"] == 7


def test_a_counter_that_is_an_element_of_a_tuple():
    """As jax 0.12 writes it."""
    text = HLO.replace("compare(%i, %constant.5)", "compare(%wide.param.103#0, %constant.5)")
    assert text != HLO and collectives(text, 8) == collectives(HLO, 8)


def test_asynchronous_pairs_of_other_backends():
    text = """
ENTRY %main (x: f32[8]) -> f32[8] {
  %ag = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %agd = f32[32]{0} all-gather-done(%ag)
  %cp = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %cpd = f32[8]{0} collective-permute-done(%cp)
  %ar = f32[8]{0} all-reduce-start(%x), channel_id=2, replica_groups={}, to_apply=%add
}
"""  # noqa: E501
    found = collectives(text, 4)
    assert [(c.kind, c.size, c.ways) for c in found] == [
        ("all-gather", 128, 4),
        ("collective-permute", 32, 4),
        ("all-reduce", 32, 4),
    ]


def test_numbers_are_elements_of_any_type():
    scattered = Collective("reduce-scatter", 4 * 8 * 2, 4, 3, 1, ("bf16[8]",))
    assert scattered.moved == 3 * 48 and scattered.numbers == 3 * 24
    mixed = Collective("all-reduce", 8 * 2 + 8 * 4, 2, 1, 0, ("bf16[8]", "f32[8]"))
    assert mixed.moved == 48 and mixed.numbers == 16
