import pytest

from spacedrive_jax.aot.hlo import Collective, array_bytes, traffic

LOOP = """HloModule step, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%condition (state: (s32[], f32[4,8])) -> pred[] {
  %state = (s32[], f32[4,8]{1,0}) parameter(0)
  %limit = s32[] constant(5)
  %count = s32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%count, %limit), direction=LT
}

%body (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %state = (s32[], f32[4,8]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  %value = f32[4,8]{1,0} get-tuple-element(%state), index=1
  %reduced = f32[4,8]{1,0} all-reduce(%value), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %next = (s32[], f32[4,8]{1,0}) tuple(%count, %reduced)
}

ENTRY %main (x: f32[4,8], table: bf16[2,16]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %table = bf16[2,16]{1,0} parameter(1)
  %whole = bf16[16,16]{1,0} all-gather(%table), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[4,8]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_counts_as_often_as_it_runs():
    moved = traffic(LOOP, 8)
    once = 4 * 8 * 4
    assert moved.collectives == (
        Collective("all-reduce", 5, 5 * 2 * once * 3 // 4),
        Collective("all-gather", 1, 16 * 16 * 2 * 7 // 8),
    )
    assert moved.interconnect_bytes == sum(each.bytes for each in moved.collectives)
    # The loop reads and writes the value five times, the gather reads a shard and writes the table.
    assert moved.hbm_bytes == 5 * 2 * once + (2 * 16 + 16 * 16) * 2


def test_a_collective_spread_over_fusions_counts_once():
    piece = """%piece{0} (p: f32[8]) -> f32[64] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %gathered = f32[64]{{0}} all-gather(%p), channel_id=7, replica_groups=mesh['x'=8] {{'x'}}
}}
"""
    main = """ENTRY %main (x: f32[8]) -> f32[64] {
  %x = f32[8]{0} parameter(0)
  %first = f32[64]{0} fusion(%x), kind=kCustom, calls=%piece1
  ROOT %second = f32[64]{0} fusion(%x), kind=kCustom, calls=%piece2
}
"""
    moved = traffic(piece.format(1) + piece.format(2) + main, 8)
    assert moved.collectives == (Collective("all-gather", 1, 64 * 4 * 7 // 8),)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("mesh['x'=2,'y'=4], dimensions={0}", 8),
        ("mesh['x'=2,'y'=4] {'y'}, dimensions={0}", 4),
        ("mesh['x'=1,'y'=2,'z'=4], device_ids=([4,2]T(1,0)) {'y'}, dimensions={0}", 2),
        ("mesh['x'=1,'y'=2,'z'=4], device_ids=([4,2]T(1,0)), dimensions={0}", 8),
    ],
)
def test_a_chip_sends_to_its_own_group_only(groups, size):
    hlo = f"""ENTRY %main (x: f32[8]) -> f32[64] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %whole = f32[64]{{0}} all-gather(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true
}}
"""
    assert traffic(hlo, 99).collectives[0].bytes == 64 * 4 * (size - 1) // size


def test_a_slice_of_an_operand_is_what_is_read():
    hlo = """%slicing (p: f32[28,100], i: s32[]) -> f32[1,100] {
  %p = f32[28,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,100]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,100}
}
ENTRY %main (x: f32[28,100], i: s32[]) -> f32[1,100] {
  %x = f32[28,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %row = f32[1,100]{1,0} fusion(%x, %i), kind=kLoop, calls=%slicing
}
"""
    assert traffic(hlo, 1).hbm_bytes == 400 + 4 + 400


@pytest.mark.parametrize(
    ("type_", "size"),
    [
        ("bf16[2,3]{1,0}", 12),
        ("(f32[4]{0}, pred[8]{0})", 24),
        ("s4[8]{0}", 8),
        ("u8[5]{0}", 5),
        ("f32[]", 4),
        ("f32[4]{0:T(8,128)S(1)}", 0),
    ],
)
def test_bytes_of_types(type_, size):
    assert array_bytes(type_, device_memory_only=True) == size


SEND = (
    "%sent = (f32[2,64]{1,0}, u32[], token[]) send(%x, %token), channel_id=4, is_host_transfer=true, "
    'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_megascale_target="{1,2,3,4}x{0:15}",_xla_megascale_transfer_type="KIND"}'
)


@pytest.mark.parametrize(
    ("kind", "size"),
    [("ALL_REDUCE", 2 * 512 * 3 // 4), ("ALL_GATHER", 512 * 3), ("REDUCE_SCATTER", 512 * 3 // 4)],
)
def test_what_goes_between_slices_is_counted_apart(kind, size):
    """The line as libtpu writes it for four slices of 16 chips; 512 bytes are sent for a chip's own part."""
    lines = ["ENTRY %main (x: f32[2,64]) -> f32[2,64] {", "  %x = f32[2,64]{1,0} parameter(0)"]
    lines += [f"  {SEND.replace('KIND', kind)}", "  ROOT %out = f32[2,64]{1,0} copy(%x)", "}"]
    moved = traffic("\n".join(lines), 64)
    assert moved.collectives == ()
    assert moved.dcn == (Collective(kind.lower().replace("_", "-"), 1, size),)


NESTED = """%slice (stack: f32[28,64], place: s32[]) -> f32[1,64] {
  %stack = f32[28,64]{1,0} parameter(0)
  %place = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %layer = f32[1,64]{1,0} dynamic-slice(%stack, %place, %zero), dynamic_slice_sizes={1,64}
}

%twice (whole: f32[28,64], at: s32[]) -> f32[1,64] {
  %whole = f32[28,64]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %part = f32[1,64]{1,0} fusion(%whole, %at), kind=kLoop, calls=%slice
  ROOT %sum = f32[1,64]{1,0} add(%part, %part)
}

ENTRY %main (all: f32[28,64], number: s32[]) -> f32[1,64] {
  %all = f32[28,64]{1,0} parameter(0)
  %number = s32[] parameter(1)
  ROOT %out = f32[1,64]{1,0} fusion(%all, %number), kind=kLoop, calls=%twice
}
"""


def test_a_slice_in_a_fusion_within_a_fusion_is_a_slice():
    assert traffic(NESTED, 1).hbm_bytes == 64 * 4 + 4 + 64 * 4  # read, the place, written
    whole = NESTED.replace(
        "dynamic-slice(%stack, %place, %zero), dynamic_slice_sizes={1,64}", "add(%stack, %stack)"
    )
    assert traffic(whole, 1).hbm_bytes == 28 * 64 * 4 + 4 + 64 * 4
