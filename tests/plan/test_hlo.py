import pytest

from imagen_jax.plan.hlo import Module, parse_instruction, shape_bytes

PROGRAM = """HloModule jit_step, is_scheduled=true

FileNames
1 "/home/someone/imagen_jax/models/layers.py"
2 "/venv/flax/linear.py"

FunctionNames
1 "ResNetBlock.__call__"
2 "Conv.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=185 end_line=185 column=1 end_column=9}
2 {file_name_id=2 function_name_id=2 line=889 end_line=889 column=1 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}


%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  ROOT %t = (s32[], f32[8]) tuple(%arg)
}

%condition (arg.1: (s32[], f32[8])) -> pred[] {
  %arg.1 = (s32[], f32[8]) parameter(0)
  %limit = s32[]{:T(128)} constant(12)
  %counter = s32[] get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[] compare(%counter, %limit), direction=LT
}

ENTRY %main.1 (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0)
  %start = s32[] constant(2)
  %copied = s32[] copy(%start)
  %state = (s32[], f32[8]) tuple(%copied, %x)
  %loop = (s32[], f32[8]) while(%state), condition=%condition, body=%body
  %known = (s32[], f32[8]) while(%state), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %y = f32[8]{0:T(128)} fusion(%x, /*index=1*/%copied), kind=kLoop, calls=%fused, \
metadata={op_name="jit(f)/conv[\\'a\\']/dot_general" stack_frame_id=2}, \
backend_config={"window_config":{"estimated_cycles":"1234"}}
}
"""


@pytest.mark.parametrize(
    "shape, size",
    [
        ("f32[8,128]{1,0:T(8,128)}", 4096),
        ("bf16[3,3,64,512]{3,2,1,0:T(8,128)(2,1)S(1)}", 3 * 3 * 64 * 512 * 2),
        ("pred[]", 1),
        ("s4[16]{0}", 8),
        ("f8e4m3fn[10]", 10),
        ("(bf16[2,4]{1,0}, /*index=1*/(u32[], s32[2]{0:S(4)}), token[])", 16 + 4 + 8),
    ],
)
def test_shape_bytes(shape, size):
    assert shape_bytes(shape) == size


def test_arrays_kept_on_the_chip_are_no_hbm_traffic():
    assert shape_bytes("(f32[8]{0:T(128)}, f32[16]{0:T(128)S(1)})", hbm_only=True) == 32


def test_unknown_element_type_is_an_error():
    with pytest.raises(ValueError, match="mystery"):
        shape_bytes("mystery[2]")


def test_an_instruction_is_taken_apart():
    root = Module(PROGRAM).computations["main.1"][-1]
    assert (root.name, root.opcode, root.shape) == ("y", "fusion", "f32[8]{0:T(128)}")
    assert root.operands == ("x", "copied")
    assert root.called == ("fused",)
    assert root.cycles == 1234
    assert root.op_name.endswith("/dot_general")


def test_operands_may_carry_their_types():
    line = (
        "  %a = (f32[2]{0:T(8)}, u32[]) all-gather-start(f32[1]{0:T(8)} %p.1), channel_id=3, dimensions={0}"
    )
    start = parse_instruction(line)
    assert (start.opcode, start.operands) == ("all-gather-start", ("p.1",))
    assert start.attributes.startswith(", channel_id=3")


def test_stack_goes_from_the_innermost_frame_out():
    module = Module(PROGRAM)
    frames = list(module.stack(module.computations["main.1"][-1]))
    assert [(frame.line, frame.function) for frame in frames] == [
        (889, "Conv.__call__"),
        (185, "ResNetBlock.__call__"),
    ]


def test_source_given_in_place():
    module = Module(PROGRAM)
    line = '  %a = f32[] add(%b, %c), metadata={op_name="x" source_file="/a/b.py" source_line=7}'
    assert [(frame.file, frame.line) for frame in module.stack(parse_instruction(line))] == [("/a/b.py", 7)]


def test_branches_of_a_conditional():
    line = "  %c = f32[] conditional(%p, %a, %b), branch_computations={%one, %two.1}"
    assert parse_instruction(line).branches == ("one", "two.1")
    line = "  %c = f32[] conditional(%p, %a, %b), true_computation=%yes, false_computation=%no"
    assert parse_instruction(line).branches == ("yes", "no")


def test_loops_are_counted_from_the_note_or_from_the_condition():
    module = Module(PROGRAM)
    entry = module.computations["main.1"]
    counts = {each.name: module.loop_count(each, entry) for each in entry if each.opcode == "while"}
    assert counts == {"loop": 10, "known": 5}


def test_a_loop_with_an_unknown_bound_is_not_guessed():
    module = Module(
        PROGRAM.replace("s32[]{:T(128)} constant(12)", "s32[] get-tuple-element(%arg.1), index=0")
    )
    entry = module.computations["main.1"]
    loop = next(each for each in entry if each.name == "loop")
    assert module.loop_count(loop, entry) is None


def test_text_without_an_entry_is_no_program():
    with pytest.raises(ValueError, match="ENTRY"):
        Module("HloModule nothing")
