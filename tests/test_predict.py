from catsdogs import checkpoint
from catsdogs.predict import Predictor
import torch, io
import numpy as np
from PIL import Image
from conftest import red_or_blue


def test_hand_made_model_tells_red_from_blue(red_blue_checkpoint):
    model = checkpoint.load(str(red_blue_checkpoint))
    predictor = Predictor(model.model, model.preprocessing, "fp32", torch.device("cpu"))
    images = [np.asarray(Image.open(io.BytesIO(red_or_blue(label, i)))) for label in ("blue", "red") for i in range(20)]
    probs = predictor(np.stack([model.preprocessing(image) for image in images]))
    assert probs.argmax(axis=1).tolist() == [0] * 20 + [1] * 20
    print(probs)
