#!/usr/bin/env bash
# DiffBoost: synthetic images for the edges of real ones, and what merging them patch by patch was worth to a segmenter, in
# cross-validation. On the breast phantom:
#
#   bash examples/diffboost_pipeline.sh
#
# On BUSI, at full size (days on a GPU; 50 samples for each of about 390 images of a fold, by the authors' edges):
#
#   DATA=/data/Dataset_BUSI_with_GT KIND=busi SAMPLES=50 HED=network-bsds500.pth bash examples/diffboost_pipeline.sh
#
# On slices of the hippocampi of the Medical Segmentation Decathlon, at small size; scores are of volumes:
#
#   DATA=/data/Task04_Hippocampus KIND=hippocampus bash examples/diffboost_pipeline.sh
#
# SAMPLES counts the synthetic images of each training image of a fold: all have as many. HED is a file of the authors' edge
# detector; without it edges are gradients.
# Every fold has a generator of its own, which never sees the fold's test images: another fold's is refused by name. A run that
# was killed goes on where it stopped when the same command is repeated.
set -euo pipefail
DATA=${DATA:+$(realpath -m "$DATA")}
OUT=${OUT:+$(realpath -m "$OUT")}
HED=${HED:+$(realpath -m "$HED")}
cd "$(dirname "$0")/.."

DATA=${DATA:-}            # folder of the data; empty: the phantom
KIND=${KIND:-demo}        # demo, busi or hippocampus: which configurations
FOLDS=${FOLDS:-3}         # folds of the cross-validation
SAMPLES=${SAMPLES:-4}     # synthetic images of each training image
PATCH=${PATCH:-}          # side of the patches that are merged, pixels
LEVEL=${LEVEL:-input}     # merge images (input, the paper) or what the network makes of them (logits, the code)
HED=${HED:-}              # weights of the edge detector: network-bsds500.pth or ControlNetHED.pth; empty: gradients
OUT=${OUT:-runs/diffboost}

case $KIND in
  demo) generator=configs/demo/busi_controlnet.yaml segmenter=configs/demo/busi_segment.yaml; PATCH=${PATCH:-16} ;;
  busi) generator=configs/busi/edges_controlnet.yaml segmenter=configs/busi/segment.yaml; PATCH=${PATCH:-64} ;;
  hippocampus)
    generator=configs/hippocampus/edges_slices.yaml segmenter=configs/hippocampus/segment_slices.yaml; PATCH=${PATCH:-16} ;;
  *) echo "KIND=$KIND; expected is demo, busi or hippocampus." >&2; exit 2 ;;
esac
. examples/pipeline.sh
begin "DATA=$DATA KIND=$KIND FOLDS=$FOLDS SAMPLES=$SAMPLES PATCH=$PATCH LEVEL=$LEVEL HED=$HED"
edges=(${HED:+--data.edges=fairdiff_lightning.networks.hed.HED "--data.edges.weights=$HED"})
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

  say "fold $fold, 3/4 a diffusion on the edges of the fold's training images, and $SAMPLES samples of each"
  train "$generated" --config "$generator" "${of[@]}" "${edges[@]}"
  generate "$generated" last --config "$generator" "${of[@]}" "${edges[@]}" --data.generate.masks=train \
    "--data.generate.per_source=$SAMPLES"

  say "fold $fold, 4/4 a segmenter on real images merged with samples"
  segment_fold merged "--data.synthetic=[$generated/synthetic]" "${merge[@]}"
done

say "what it was worth"
folds_of() { local IFS=,; local found=("$OUT"/fold_*/"$1"); echo "${found[*]}"; }
python examples/compare_runs.py "baseline=$(folds_of baseline)" "classical=$(folds_of classical)" "DiffBoost=$(folds_of merged)" \
  --output "$OUT/comparison.md"
echo "Table: $OUT/comparison.md   reports: $OUT/*/*/lightning_logs/*/fairness/report.html"
