#!/usr/bin/env bash
# DiffBoost: synthetic images for the edges of real ones, and what merging them patch by patch was worth to a segmenter, in
# cross-validation. On the breast phantom:
#
#   bash examples/diffboost_pipeline.sh
#
# On BUSI, at full size (days on a GPU; 50 samples for each of about 390 images of a fold):
#
#   DATA=/data/Dataset_BUSI_with_GT KIND=busi SAMPLES=19500 bash examples/diffboost_pipeline.sh
#
# Every fold has a generator of its own, which never sees the fold's test images: another fold's is refused by name. A run that
# was killed goes on where it stopped when the same command is repeated.
set -euo pipefail
DATA=${DATA:+$(realpath -m "$DATA")}
OUT=${OUT:+$(realpath -m "$OUT")}
cd "$(dirname "$0")/.."

DATA=${DATA:-}            # folder of the data; empty: the phantom
KIND=${KIND:-demo}        # demo or busi: which configurations
FOLDS=${FOLDS:-3}         # folds of the cross-validation
SAMPLES=${SAMPLES:-128}   # synthetic images in each fold, evenly over the diagnoses and within each over its real images
PATCH=${PATCH:-}          # side of the patches that are merged, pixels
LEVEL=${LEVEL:-input}     # merge images (input, the paper) or what the network makes of them (logits, the code)
OUT=${OUT:-runs/diffboost}

case $KIND in
  demo) generator=configs/demo/busi_controlnet.yaml segmenter=configs/demo/busi_segment.yaml; PATCH=${PATCH:-16} ;;
  busi) generator=configs/busi/edges_controlnet.yaml segmenter=configs/busi/segment.yaml; PATCH=${PATCH:-64} ;;
  *) echo "KIND=$KIND; expected is demo or busi." >&2; exit 2 ;;
esac
. examples/pipeline.sh
begin "DATA=$DATA KIND=$KIND FOLDS=$FOLDS SAMPLES=$SAMPLES PATCH=$PATCH LEVEL=$LEVEL"
merge=(--data.merge=PatchMerge "--data.merge.patch_size=$PATCH" "--data.merge.level=$LEVEL")

segment_fold() { # name, arguments of training
  local folder=$OUT/fold_$fold/$1; shift
  train "$folder" --config "$segmenter" "${of[@]}" "$@"
  fairdiff test --config "$segmenter" "${of[@]}" "${data[@]}" "${quiet[@]}" "--trainer.default_root_dir=$folder" --ckpt_path=last \
    --verbose=false
}

for ((fold = 0; fold < FOLDS; fold++)); do
  of=("--data.fold=$fold" "--data.num_folds=$FOLDS")
  generated=$OUT/fold_$fold/generator
  say "fold $fold, 1/4 a segmenter on the real images alone"
  segment_fold baseline

  say "fold $fold, 2/4 with all classical augmentations"
  segment_fold classical --data.augment=true --data.augmentation=all

  say "fold $fold, 3/4 a diffusion on the edges of the fold's training images, and $SAMPLES samples"
  train "$generated" --config "$generator" "${of[@]}"
  generate "$generated" last --config "$generator" "${of[@]}" --data.generate.masks=train "--data.generate.total=$SAMPLES"

  say "fold $fold, 4/4 a segmenter on real images merged with samples"
  segment_fold merged "--data.synthetic=[$generated/synthetic]" "${merge[@]}"
done

say "what it was worth"
folds_of() { local IFS=,; local found=("$OUT"/fold_*/"$1"); echo "${found[*]}"; }
python examples/compare_runs.py "baseline=$(folds_of baseline)" "classical=$(folds_of classical)" "DiffBoost=$(folds_of merged)" \
  --output "$OUT/comparison.md"
echo "Table: $OUT/comparison.md   reports: $OUT/*/*/lightning_logs/*/fairness/report.html"
