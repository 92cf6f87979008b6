"""STUB"""
from typing import NamedTuple
import torch
class Place(NamedTuple):
    path: str
    side: str
def expand(names, available):
    out=[]
    for n in names:
        if n=="layers": out+= [a for a in sorted(available) if a.startswith("layer") and not a.endswith("preact")]
        elif n=="layers.preact": out+= [a for a in sorted(available) if a.endswith("preact")]
        else: out.append(n)
    return out
def places(model, hooks, name, image_shape):
    r={}
    for k,v in hooks.items():
        r[k]=Place(v[6:-1],"input") if v.startswith("input(") else Place(v,"output")
    return r
class Extractor:
    def __init__(self, model, places, model_name):
        self.model, self.places, self.model_name = model, places, model_name
    def shapes(self, image_shape):
        self.model.eval()
        with torch.no_grad():
            v=self(torch.zeros(2,*image_shape), [*self.places,"logits"])
        self.model.train()
        return {k:tuple(x.shape[1:]) for k,x in v.items()}
    def __call__(self, images, points):
        got={}; hs=[]
        for p in points:
            if p=="logits": continue
            pl=self.places[p]; m=self.model.get_submodule(pl.path)
            if pl.side=="output": hs.append(m.register_forward_hook(lambda m,i,o,p=p: got.__setitem__(p,o)))
            else: hs.append(m.register_forward_pre_hook(lambda m,i,p=p: got.__setitem__(p,i[0])))
        try: got["logits"]=self.model(images)
        finally:
            for h in hs: h.remove()
        return got
