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
segmenter=$(config segment)
. examples/pipeline.sh
begin "DATA=$DATA KIND=$KIND PAIRS=$PAIRS JOINT=$JOINT"

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
generate "$OUT/pairs" last "${pairs[@]}" "--data.generate.total=$PAIRS"

say "4/4 a segmenter on real slices and pairs"
segment mixed "--data.synthetic=[$OUT/pairs/synthetic]"

say "what it was worth"
python examples/show_synthetic.py "$OUT/pairs/synthetic" --output "$OUT/samples.png" --dataset dbt --attribute "$groups" \
  ${DATA:+"--root=$DATA"}
python examples/compare_runs.py "real only=$OUT/real" "real and pairs=$OUT/mixed" --output "$OUT/comparison.md"
echo "Table: $OUT/comparison.md   picture: $OUT/samples.png   reports: $OUT/*/lightning_logs/*/fairness/report.html"
