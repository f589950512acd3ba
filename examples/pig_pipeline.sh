#!/usr/bin/env bash
# PIG: pairs of image and mask out of a small data set, and what they were worth to a segmenter. On the phantom, in minutes:
#
#   bash examples/pig_pipeline.sh
#
# On your own slices (img/ and mask/ beside each other, see docs/data.md), at full size (days on a GPU):
#
#   DATA=/data/slices KIND=dbt PAIRS=2048 bash examples/pig_pipeline.sh
#
# JOINT=1 trains both networks at once instead of one after the other. A run that was killed goes on where it stopped when the
# same command is repeated.
set -euo pipefail
DATA=${DATA:+$(realpath -m "$DATA")}
OUT=${OUT:+$(realpath -m "$OUT")}
cd "$(dirname "$0")/.."

DATA=${DATA:-}        # folder with img/ and mask/; empty: the phantom
KIND=${KIND:-demo}    # demo or dbt: which configurations
PAIRS=${PAIRS:-64}    # pairs to generate
JOINT=${JOINT:-}      # not empty: both networks in one pass
OUT=${OUT:-runs/pig}

case $KIND in
  demo) prefix=configs/demo/dbt_; groups=density ;;
  dbt) prefix=configs/dbt/; groups=view ;;
  *) echo "KIND=$KIND; expected is demo or dbt." >&2; exit 2 ;;
esac
config() { echo "$prefix$1.yaml"; }
data=(${DATA:+"--data.root=$DATA"})
quiet=(--trainer.enable_progress_bar=false --trainer.enable_model_summary=false)
start=$SECONDS

settings="DATA=$DATA KIND=$KIND PAIRS=$PAIRS JOINT=$JOINT"
mkdir -p "$OUT"
if [ -f "$OUT/settings" ] && [ "$(cat "$OUT/settings")" != "$settings" ]; then
  echo "$OUT was made with $(cat "$OUT/settings"), this run has $settings: set OUT to another folder, or remove it." >&2
  exit 2
fi
echo "$settings" > "$OUT/settings"

say() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - start)); }

checkpoint() { # folder, name: the newest, nothing when there is none
  if [ -d "$1" ]; then find "$1" -name "$2.ckpt" -exec ls -t {} + | head -n 1; fi
}

train() { # folder, arguments: begins, or goes on from the last checkpoint
  local folder=$1; shift
  local last; last=$(checkpoint "$folder" last)
  fairdiff fit "$@" "${data[@]}" "${quiet[@]}" "--trainer.default_root_dir=$folder" ${last:+"--ckpt_path=$last"}
}

segment() { # name, arguments
  local folder=$OUT/$1; shift
  train "$folder" --config "$(config segment)" "$@"
  fairdiff test --config "$(config segment)" "${data[@]}" "${quiet[@]}" "--trainer.default_root_dir=$folder" \
    --ckpt_path=last --verbose=false
}

say "1/4 a segmenter on the real slices alone"
segment real

if [ -n "$JOINT" ]; then
  pairs=(--config "$(config pig)")
  say "2/4 both diffusions at once"
else
  say "2/4 the guider: a diffusion of masks that sees the noisy image; then the target, which sees its masks"
  train "$OUT/guider" --config "$(config pig_guider)"
  pairs=(--config "$(config pig_target)" "--model.guider_checkpoint=$(checkpoint "$OUT/guider" last)")
fi
train "$OUT/pairs" "${pairs[@]}"

say "3/4 $PAIRS pairs"
fairdiff predict "${pairs[@]}" "${data[@]}" "${quiet[@]}" "--data.generate.total=$PAIRS" \
  "--trainer.default_root_dir=$OUT/pairs" --ckpt_path=last
echo "$(($(wc -l < "$OUT/pairs/synthetic/manifest.csv") - 1)) pairs in $OUT/pairs/synthetic"

say "4/4 a segmenter on real slices and pairs"
segment mixed "--data.synthetic=[$OUT/pairs/synthetic]"

say "what it was worth"
python examples/show_synthetic.py "$OUT/pairs/synthetic" --output "$OUT/samples.png" --dataset dbt --attribute "$groups" \
  ${DATA:+"--root=$DATA"}
python examples/compare_runs.py "real only=$OUT/real" "real and pairs=$OUT/mixed" --output "$OUT/comparison.md"
echo "Table: $OUT/comparison.md   picture: $OUT/samples.png   reports: $OUT/*/lightning_logs/*/fairness/report.html"
