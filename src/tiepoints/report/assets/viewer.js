// A point cloud that turns by dragging, drawn by software on a canvas with a depth buffer.
for (const figure of document.querySelectorAll(".viewer")) {
  const model = JSON.parse(figure.querySelector("script").textContent);
  const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const grid = new Uint16Array(bytes(model.positions).buffer), color = bytes(model.colors);
  const count = color.length / 3, xyz = new Float32Array(grid.length), packed = new Uint32Array(count);
  for (let i = 0; i < grid.length; i++) {
    const axis = i % 3;
    xyz[i] = model.low[axis] + (model.high[axis] - model.low[axis]) * grid[i] / 65535;
  }
  for (let i = 0; i < count; i++)
    packed[i] = 0xff000000 | color[3 * i + 2] << 16 | color[3 * i + 1] << 8 | color[3 * i];
  const canvas = figure.querySelector("canvas"), context = canvas.getContext("2d");
  const label = figure.querySelector(".label"), size = figure.querySelector("[name=size]");
  const cameras = figure.querySelector("[name=cameras]"), turning = figure.querySelector("[name=turn]");
  const start = { yaw: 0.3, pitch: 0.3, distance: model.distance, x: 0, y: 0, z: 0 };
  let pose = { ...start }, image, pixels, depth, pointer = null, pending = false;

  // rows of the rotation from the world (y up) to the camera (x right, y down, z forward)
  function rotation() {
    const [a, b] = [pose.yaw, pose.pitch];
    const [c, s, d, t] = [Math.cos(a), Math.sin(a), Math.cos(b), Math.sin(b)];
    return [c, 0, -s, s * t, -d, c * t, -s * d, -t, -c * d];
  }

  function projection() {
    const r = rotation(), w = canvas.width, h = canvas.height, f = 1.1 * Math.min(w, h);
    return (x, y, z) => {
      x -= pose.x; y -= pose.y; z -= pose.z;
      const forward = r[6] * x + r[7] * y + r[8] * z + pose.distance;
      return [
        w / 2 + f * (r[0] * x + r[1] * y + r[2] * z) / forward,
        h / 2 + f * (r[3] * x + r[4] * y + r[5] * z) / forward, forward,
      ];
    };
  }

  function draw() {
    pending = false;
    const w = canvas.width, h = canvas.height, r = rotation(), f = 1.1 * Math.min(w, h);
    if (!image || image.width !== w || image.height !== h) {
      image = context.createImageData(w, h);
      pixels = new Uint32Array(image.data.buffer);
      depth = new Float32Array(w * h);
    }
    pixels.fill(0xff1d1713);
    depth.fill(Infinity);
    const side = Number(size.value) * (window.devicePixelRatio || 1);
    for (let i = 0; i < count; i++) {
      const x = xyz[3 * i] - pose.x, y = xyz[3 * i + 1] - pose.y, z = xyz[3 * i + 2] - pose.z;
      const forward = r[6] * x + r[7] * y + r[8] * z + pose.distance;
      if (forward < 0.02) continue;
      const u = w / 2 + f * (r[0] * x + r[1] * y + r[2] * z) / forward;
      const v = h / 2 + f * (r[3] * x + r[4] * y + r[5] * z) / forward;
      const left = Math.max(0, Math.round(u - side / 2)), top = Math.max(0, Math.round(v - side / 2));
      const right = Math.min(w, Math.round(u + side / 2)), bottom = Math.min(h, Math.round(v + side / 2));
      for (let q = top; q < bottom; q++)
        for (let p = left; p < right; p++)
          if (forward < depth[q * w + p]) {
            depth[q * w + p] = forward;
            pixels[q * w + p] = packed[i];
          }
    }
    context.putImageData(image, 0, 0);
    if (cameras.checked) drawCameras();
  }

  function drawCameras() {
    const project = projection();
    context.strokeStyle = "#ff7043";
    context.lineWidth = window.devicePixelRatio || 1;
    context.beginPath();
    for (const camera of model.cameras) {
      const [center, ...corners] = camera.corners.map(corner => project(...corner));
      if ([center, ...corners].some(corner => corner[2] < 0.02)) continue;
      corners.forEach((corner, k) => {
        context.moveTo(center[0], center[1]);
        context.lineTo(corner[0], corner[1]);
        context.lineTo(...corners[(k + 1) % 4].slice(0, 2));
      });
    }
    context.stroke();
  }

  function request() {
    if (!pending) requestAnimationFrame(draw);
    pending = true;
  }

  // shows the name of the camera near the pointer
  function name(event) {
    const scale = canvas.width / canvas.clientWidth, project = projection();
    const x = event.offsetX * scale, y = event.offsetY * scale;
    let best = 14 * scale;
    label.textContent = "";
    if (!cameras.checked) return;
    for (const camera of model.cameras) {
      const [u, v, forward] = project(...camera.corners[0]);
      const distance = Math.hypot(u - x, v - y);
      if (forward > 0 && distance < best) [best, label.textContent] = [distance, camera.name];
    }
  }

  function pan(dx, dy) {
    const r = rotation(), step = pose.distance / (1.1 * Math.min(canvas.clientWidth, canvas.clientHeight));
    ["x", "y", "z"].forEach((axis, k) => { pose[axis] -= step * (r[k] * dx + r[3 + k] * dy); });
  }

  canvas.addEventListener("pointerdown", event => {
    pointer = event;
    turning.checked = false;
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointerup", () => { pointer = null; });
  canvas.addEventListener("pointermove", event => {
    if (!pointer) return name(event);
    const dx = event.clientX - pointer.clientX, dy = event.clientY - pointer.clientY;
    if (event.shiftKey || event.buttons === 2) pan(dx, dy);
    else {
      pose.yaw -= 0.008 * dx;
      pose.pitch = Math.max(-1.57, Math.min(1.57, pose.pitch + 0.008 * dy));
    }
    pointer = event;
    request();
  });
  canvas.addEventListener("contextmenu", event => event.preventDefault());
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    pose.distance = Math.max(0.05, Math.min(50, pose.distance * Math.exp(0.001 * event.deltaY)));
    request();
  }, { passive: false });
  canvas.addEventListener("keydown", event => {
    const step = { ArrowLeft: [0.1, 0], ArrowRight: [-0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[event.key];
    const zoom = { "+": 0.9, "-": 1.1 }[event.key];
    if (!step && !zoom) return;
    event.preventDefault();
    if (step) [pose.yaw, pose.pitch] = [pose.yaw + step[0], Math.max(-1.57, Math.min(1.57, pose.pitch + step[1]))];
    if (zoom) pose.distance *= zoom;
    request();
  });
  figure.querySelector("button").addEventListener("click", () => { pose = { ...start }; request(); });
  for (const control of [size, cameras]) control.addEventListener("input", request);
  turning.addEventListener("input", () => requestAnimationFrame(turn));

  let before = 0;
  function turn(now) {
    if (!turning.checked) return;
    pose.yaw += 0.0003 * Math.min(100, now - before);
    before = now;
    draw();
    requestAnimationFrame(turn);
  }

  function resize() {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
    canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio));
    draw();
  }
  new ResizeObserver(resize).observe(canvas);
}
