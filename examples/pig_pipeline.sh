#!/usr/bin/env bash
# PIG: pairs of image and mask out of a small data set, and what they were worth to a segmenter. On the phantom, in minutes:
#
#   bash examples/pig_pipeline.sh
#
# On your own slices (img/ and mask/ beside each other, see docs/data.md), the paper's table: 0, 1024, 2048 and 3072 pairs in each
# of five folds of patients, at full size (days on a GPU):
#
#   DATA=/data/slices KIND=dbt FOLDS=5 bash examples/pig_pipeline.sh
#
# Each number of pairs holds those of the smaller numbers. Every fold has a generator of its own, which never sees the fold's test
# slices. JOINT=1 trains both networks at once instead of one after the other. A run that was killed goes on where it stopped when
# the same command is repeated.
set -euo pipefail
DATA=${DATA:+$(realpath -m "$DATA")}
OUT=${OUT:+$(realpath -m "$OUT")}
cd "$(dirname "$0")/.."

DATA=${DATA:-}        # folder with img/ and mask/; empty: the phantom
KIND=${KIND:-demo}    # demo or dbt: which configurations
PAIRS=${PAIRS:-}      # how many pairs, such as "64 128", to compare with each other and with none
FOLDS=${FOLDS:-1}     # how many of the five folds
JOINT=${JOINT:-}      # not empty: both networks in one pass
OUT=${OUT:-runs/pig}

case $KIND in
  demo) prefix=configs/demo/dbt_ groups=density PAIRS=${PAIRS:-64} ;;
  dbt) prefix=configs/dbt/ groups=view PAIRS=${PAIRS:-1024 2048 3072} ;;
  *) echo "KIND=$KIND; expected is demo or dbt." >&2; exit 2 ;;
esac
read -ra counts <<< "$(tr -s ' ' '\n' <<< "$PAIRS" | sort -nu | tr '\n' ' ')"
for count in "${counts[@]}"; do
  [[ $count =~ ^[1-9][0-9]*$ ]] || { echo "PAIRS=$PAIRS; expected are numbers from 1, none is always compared." >&2; exit 2; }
done
[[ $FOLDS =~ ^[1-5]$ ]] || { echo "FOLDS=$FOLDS; expected is a number from 1 to 5." >&2; exit 2; }
config() { echo "$prefix$1.yaml"; }
segmenter=$(config segment)
. examples/pipeline.sh
begin "DATA=$DATA KIND=$KIND PAIRS=$PAIRS FOLDS=$FOLDS JOINT=$JOINT"
of_all=("${data[@]}")

for ((fold = 0; fold < FOLDS; fold++)); do
  here=fold_$fold data=("${of_all[@]}" "--data.fold=$fold")
  say "fold $fold, 1/4 a segmenter on the real slices alone"
  segment "$here/real"

  if [ -n "$JOINT" ]; then
    generator=(--config "$(config pig)")
    say "fold $fold, 2/4 both diffusions at once"
  else
    say "fold $fold, 2/4 the guider: a diffusion of masks that sees the noisy image; then the target, which sees its masks"
    train "$OUT/$here/guider" --config "$(config pig_guider)"
    generator=(--config "$(config pig_target)" "--model.guider_checkpoint=$(checkpoint "$OUT/$here/guider" last)")
  fi
  train "$OUT/$here/generator" "${generator[@]}"

  say "fold $fold, 3/4 pairs: $PAIRS"
  trained=$(checkpoint "$OUT/$here/generator" last)
  made=0 seed=0
  for count in "${counts[@]}"; do
    generate "$OUT/$here/pairs_$count" "$trained" "${generator[@]}" "--data.generate.total=$((count - made))" \
      "--data.generate.seed=$seed"
    made=$count seed=$((seed + 1))
  done

  say "fold $fold, 4/4 segmenters on real slices and pairs: $PAIRS"
  folders=()
  for count in "${counts[@]}"; do
    folders+=("$OUT/$here/pairs_$count/synthetic")
    segment "$here/mixed_$count" "--data.synthetic=[$(IFS=,; echo "${folders[*]}")]"
  done
done

say "what it was worth"
folds_of() { local IFS=,; local found=("$OUT"/fold_*/"$1"); echo "${found[*]}"; }
runs=("real only=$(folds_of real)")
for count in "${counts[@]}"; do runs+=("real and $count pairs=$(folds_of "mixed_$count")"); done
python examples/show_synthetic.py "$OUT/fold_0/pairs_${counts[0]}/synthetic" --output "$OUT/samples.png" --dataset dbt \
  --attribute "$groups" ${DATA:+"--root=$DATA"}
python examples/compare_runs.py "${runs[@]}" --output "$OUT/comparison.md"
echo "Table: $OUT/comparison.md   picture: $OUT/samples.png   reports: $OUT/*/*/lightning_logs/*/fairness/report.html"
