#!/usr/bin/env bash
# FairDiff from an unbalanced data set to a fairer segmenter, and what it was worth. On the phantom, in minutes:
#
#   bash examples/fairdiff_pipeline.sh
#
# On your own data in FairSeg's layout, at full size (days on a GPU):
#
#   DATA=/data/fairseg KIND=fairseg TOTAL=15000 bash examples/fairdiff_pipeline.sh
#
# A run that was killed goes on where it stopped when the same command is repeated.
set -euo pipefail
DATA=${DATA:+$(realpath -m "$DATA")}
OUT=${OUT:+$(realpath -m "$OUT")}
cd "$(dirname "$0")/.."

DATA=${DATA:-}                  # folder with the .npz files; empty: the phantom
KIND=${KIND:-demo}              # demo or fairseg: which configurations
TOTAL=${TOTAL:-}                # size of the Equal-Scale set; empty: as many as there are real training samples
STEPS=${STEPS:-}                # training steps of each segmenter; empty: as the configuration says
JOBS=${JOBS:-1}                 # 2: what learns masks and what learns images run at once
OUT=${OUT:-runs/fairdiff}

case $KIND in
  demo) points=configs/demo/fairseg_points.yaml controlnet=configs/demo/fairseg_controlnet.yaml
        segmenter=configs/demo/fairseg_plain.yaml ;;
  fairseg) points=configs/fairseg/point_diffusion.yaml controlnet=configs/fairseg/controlnet.yaml
        segmenter=configs/fairseg/transunet.yaml ;;
  *) echo "KIND=$KIND; expected is demo or fairseg." >&2; exit 2 ;;
esac
steps=(${STEPS:+"--trainer.max_steps=$STEPS" --trainer.max_epochs=-1 --trainer.check_val_every_n_epoch=5})
scale=(--data.generate.equal_scale=true ${TOTAL:+"--data.generate.total=$TOTAL"})
. examples/pipeline.sh
begin "DATA=$DATA KIND=$KIND TOTAL=$TOTAL STEPS=$STEPS"

balanced() { # folder, arguments: what each group lacks
  generate "$1" last "${@:2}" "${scale[@]}"
  [ "$(wc -l < "$1/synthetic/manifest.csv")" -gt 1 ] ||
    { echo "No group lacks samples for an Equal-Scale set of this size: give a larger TOTAL." >&2; exit 1; }
}

say "1/7 a segmenter on the real samples alone"
train "$OUT/real" --config "$segmenter" "${steps[@]}"

learn_masks() {
  score real

  say "2/7 a segmenter on the real samples, small groups repeated"
  segment oversampled "${steps[@]}" --data.balance=oversample

  say "3/7 point diffusion on the outlines of the masks"
  train "$OUT/points" --config "$points"

  say "4/7 masks for the groups that lack them"
  balanced "$OUT/points" --config "$points"
}

learn_images() {
  say "5/7 ControlNet from masks to images"
  train "$OUT/controlnet" --config "$controlnet" "--model.adherence=$(checkpoint "$OUT/real" last)"
}

side_by_side learn_masks learn_images

say "6/7 images for these masks"
balanced "$OUT/controlnet" --config "$controlnet" "--data.generate.masks=$OUT/points/synthetic"

say "7/7 a segmenter on the Equal-Scale set"
segment equal_scale "${steps[@]}" --data.balance=equal_scale "--data.synthetic=[$OUT/controlnet/synthetic]" ${TOTAL:+"--data.total=$TOTAL"}

draw() {
  python examples/show_synthetic.py "$OUT/controlnet/synthetic" --output "$OUT/samples.png" ${DATA:+"--root=$DATA"}
}

compare() {
  python examples/compare_runs.py "real only=$OUT/real" "oversampled=$OUT/oversampled" "Equal Scale=$OUT/equal_scale" \
    --output "$OUT/comparison.md"
}

say "what it was worth"
side_by_side draw compare
echo "Table: $OUT/comparison.md   picture: $OUT/samples.png   reports: $OUT/*/lightning_logs/*/fairness/report.html"
