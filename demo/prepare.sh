# Sourced by run_zero2.sh when it is given no model and no data: makes the demo's once, and says how to train on them.

DEMO_DIR=$HERE/output/demo
MODEL=$DEMO_DIR/model
DATA=$DEMO_DIR/data/conversations
HELD_OUT=$DEMO_DIR/data/held_out
FIRST_STAGE=$DEMO_DIR/first_stage

# One sum over everything that makes them; when it changes they are made again.
MAKERS=$(cat "$HERE"/demo/{scenes,english,chinese,questions,make_data}.py "$HERE"/demo/prepare.sh \
    "$HERE"/demo/{clip,qwen}/* "$HERE"/train_llava/build_model.py | cksum)
mkdir -p "$HERE/output" || fail "the demo lives in $HERE/output; use a copy that you may write to"

lock_demo() {
    exec 9>"$HERE/output/.demo.lock"
    "$PYTHON" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'  # another run may be making them
}

lock_demo
if [ "$MAKERS" != "$(cat "$DEMO_DIR/makers" 2>/dev/null)" ]; then
    echo "Making the demo's images and its untrained LLaVA (once) ..."
    rm -rf "$DEMO_DIR.new"
    "$PYTHON" -m demo.make_data --output_dir "$DEMO_DIR.new/data" &
    "$PYTHON" -m train_llava.build_model --vision_model_name_or_path "$HERE/demo/clip" \
        --language_model_name_or_path "$HERE/demo/qwen" --output_dir "$DEMO_DIR.new/model"
    wait $!
    echo "$MAKERS" >"$DEMO_DIR.new/makers"
    rm -rf "$DEMO_DIR"
    mv "$DEMO_DIR.new" "$DEMO_DIR"
fi
exec 9>&-
EXAMPLE_IMAGE=$(compgen -G "$HELD_OUT/images/held_out_000000.*")

# Settings for a model of two million weights: high rates, many small steps, and no checkpoints on the way.
case $TRAIN_TYPE in
    none | freeze_vision) DEMO_RATE=5e-4 ;;
    use_lora) DEMO_RATE=1e-3 ;;
    *) DEMO_RATE=2e-3 ;;
esac
EACH=$(( (16 + RANKS - 1) / RANKS )) SAMPLES=$(( EACH * RANKS ))  # 16 in a step; on three ranks 18
DEMO_FLAGS=(
    --overwrite_output_dir true
    --max_steps 600
    --learning_rate "$DEMO_RATE"
    --adam_beta2 0.95
    --save_strategy no
    --logging_steps 30
    --sample_steps 200
)

# As LLaVA is trained: first the projector alone, on captions; then the strategy asked for, on conversations.
first_stage() { # first_stage FLAGS... ; adds to FLAGS that the training begins with its result
    lock_demo
    if [ ! -f "$FIRST_STAGE.done" ]; then
        echo "Stage 1 (once): the projector alone, on captions"
        launch "$@" --model_name_or_path "$MODEL" --data_path "$DEMO_DIR/data/captions" --train_type projector \
            --output_dir "$FIRST_STAGE" --learning_rate 2e-3 --max_steps 400 --report_to none 9>&-
        [ "$STATUS" -eq 0 ] || exit "$STATUS"
        touch "$FIRST_STAGE.done"
    fi
    exec 9>&-
    FLAGS+=(--model_name_or_path "$FIRST_STAGE" --eval_data_path "$HELD_OUT")
    echo "Stage 2: --train_type $TRAIN_TYPE, on conversations"
}

show_demo() {
    echo
    "$PYTHON" -m demo.show --model_name_or_path "$OUTPUT_DIR" --data_path "$HELD_OUT"
}
