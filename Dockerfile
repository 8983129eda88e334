# nemo_kd in NVIDIA's NeMo container: docker build -t nemo-kd .
FROM nvcr.io/nvidia/nemo:25.07

WORKDIR /opt/nemo_kd
COPY . .
# --no-deps leaves the container's torch, NeMo, Megatron Core, Apex and Transformer Engine as they
# are. It has all that the package imports but xxhash, whose wheel depends on nothing.
RUN pip install --no-cache-dir --no-deps . "xxhash>=3.4" \
 && python -c "import nemo_kd.cache, nemo_kd.loss"
