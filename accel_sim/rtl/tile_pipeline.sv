// The control of the double-buffered machine: loads, computes and stores the steps of a program.
//
// - Step s takes operand buffer s modulo `buffers`; its load is asked for when step s - buffers has computed.
// - Steps compute in order, each when its load is through. One that begins an output tile takes an accumulator buffer;
//   `buffers` of them may be taken, each until its tile has been stored.
// - A computed step that ends an output tile (`store_bytes` not 0) asks for the tile's store.
// - Loads, and stores unless `store_on_channel` is 0, share one memory_channel. Otherwise stores have a way of their own
//   to the scratchpad, `way_rate` wide and without latency.
//
// The step table is outside and answers in the same cycle. The first `buffers` steps are fetched between `start` and
// cycle 0, from which on `cycles` counts.
module tile_pipeline #(
    parameter STEP_BITS = 14,
    parameter SLOT_BITS = 2,     // up to 2 ** SLOT_BITS - 1 buffers
    parameter BYTES_BITS = 24,
    parameter LATENCY_BITS = 7
) (
    input  logic                    clk,
    input  logic                    reset,
    // the machine
    input  logic [   SLOT_BITS-1:0] buffers,
    input  logic [LATENCY_BITS-1:0] latency,
    input  logic [  BYTES_BITS+7:0] rate,
    input  logic [  BYTES_BITS+7:0] way_rate,
    input  logic                    pipelined,
    input  logic                    store_on_channel,
    input  logic                    ties,
    // the program
    input  logic                    start,
    input  logic [   STEP_BITS-1:0] steps,
    output logic [   STEP_BITS-1:0] load_step,
    input  logic [  BYTES_BITS-1:0] load_bytes,
    output logic [   STEP_BITS-1:0] compute_step,
    input  logic [  BYTES_BITS-1:0] store_bytes,       // of step `compute_step`
    // the array: `compute_start` in its first cycle, `compute_done` in its last
    output logic                    compute_start,
    input  logic                    compute_done,
    // what comes and goes: each load from the channel's side, each in the order of the steps
    output logic                    load_take,
    output logic                    load_done,
    output logic                    store_done,
    output logic                    finished,
    output logic [            31:0] cycles
);
  localparam [STEP_BITS-1:0] NO_STEP = 0;
  localparam [SLOT_BITS-1:0] SLOT_0 = 0;
  localparam FILL = STEP_BITS - SLOT_BITS;
  localparam LOAD = BYTES_BITS + SLOT_BITS;

  logic fetching, running, computing, begins;
  logic [SLOT_BITS-1:0] slot, tiles_open, stores_open;
  logic [(1<<SLOT_BITS)-1:0] loaded;

  // computing
  wire room = !begins || tiles_open < buffers;
  assign compute_start = running && !computing && compute_step != steps && loaded[slot] && room;
  wire computed = running && compute_done;
  wire ends = computed && store_bytes != {BYTES_BITS{1'b0}};

  // a step's load is released when the step that had its buffer has computed
  wire [STEP_BITS-1:0] next = compute_step + {{FILL{1'b0}}, buffers};
  assign load_step = fetching ? {{FILL{1'b0}}, slot} : next;
  wire release_load = (fetching || computed) && load_step < steps;
  wire loads_nothing = load_bytes == {BYTES_BITS{1'b0}};
  wire [SLOT_BITS-1:0] next_slot = slot == buffers - 1'b1 ? SLOT_0 : slot + 1'b1;

  wire load_valid, store_valid, store_take, channel_store_take, channel_store_done, way_take, way_done;
  wire [LOAD-1:0] load_head;
  wire [BYTES_BITS-1:0] store_head;
  wire [31:0] load_stamp, store_stamp;
  wire [31:0] stamp = fetching ? 32'd0 : cycles + 32'd1;
  wire [SLOT_BITS-1:0] load_done_slot;

  request_queue #(
      .BITS(LOAD),
      .INDEX_BITS(SLOT_BITS)
  ) loads (
      .clk(clk),
      .reset(reset),
      .push(release_load && !loads_nothing),
      .pushed({slot, load_bytes}),
      .pushed_stamp(stamp),
      .take(load_take),
      .valid(load_valid),
      .head(load_head),
      .head_stamp(load_stamp)
  );
  request_queue #(
      .BITS(BYTES_BITS),
      .INDEX_BITS(SLOT_BITS)
  ) stores (
      .clk(clk),
      .reset(reset),
      .push(ends),
      .pushed(store_bytes),
      .pushed_stamp(stamp),
      .take(store_take),
      .valid(store_valid),
      .head(store_head),
      .head_stamp(store_stamp)
  );
  memory_channel #(
      .BYTES_BITS(BYTES_BITS),
      .TAG_BITS(SLOT_BITS),
      .LATENCY_BITS(LATENCY_BITS)
  ) dram (
      .clk(clk),
      .reset(reset),
      .enable(running),
      .ties(ties),
      .pipelined(pipelined),
      .latency(latency),
      .rate(rate),
      .load_valid(load_valid),
      .load_bytes(load_head[BYTES_BITS-1:0]),
      .load_tag(load_head[LOAD-1:BYTES_BITS]),
      .load_stamp(load_stamp),
      .load_take(load_take),
      .load_done(load_done),
      .load_done_tag(load_done_slot),
      .store_valid(store_valid && store_on_channel),
      .store_bytes(store_head),
      .store_stamp(store_stamp),
      .store_take(channel_store_take),
      .store_done(channel_store_done)
  );
  /* verilator lint_off PINCONNECTEMPTY */
  memory_channel #(
      .BYTES_BITS(BYTES_BITS),
      .TAG_BITS(SLOT_BITS),
      .LATENCY_BITS(1)
  ) way_to_scratchpad (
      .clk(clk),
      .reset(reset),
      .enable(running),
      .ties(1'b0),
      .pipelined(1'b1),
      .latency(1'b0),
      .rate(way_rate),
      .load_valid(1'b0),
      .load_bytes({BYTES_BITS{1'b0}}),
      .load_tag(SLOT_0),
      .load_stamp(32'd0),
      .load_take(),
      .load_done(),
      .load_done_tag(),
      .store_valid(store_valid && !store_on_channel),
      .store_bytes(store_head),
      .store_stamp(store_stamp),
      .store_take(way_take),
      .store_done(way_done)
  );
  /* verilator lint_on PINCONNECTEMPTY */
  assign store_take = channel_store_take || way_take;
  assign store_done = channel_store_done || way_done;
  assign finished = running && compute_step == steps && stores_open == SLOT_0;

  always_ff @(posedge clk) begin
    if (reset) begin
      fetching <= 1'b0;
      running <= 1'b0;
      computing <= 1'b0;
    end else if (start) begin
      fetching <= 1'b1;
      begins <= 1'b1;
      cycles <= 32'd0;
      compute_step <= NO_STEP;
      slot <= SLOT_0;
      tiles_open <= SLOT_0;
      stores_open <= SLOT_0;
    end else if (fetching) begin
      slot <= next_slot;
      loaded[slot] <= loads_nothing;
      fetching <= next_slot != SLOT_0;
      running <= next_slot == SLOT_0;
    end else if (running) begin
      cycles <= cycles + 32'd1;
      running <= !finished;
      computing <= (computing || compute_start) && !compute_done;
      if (computed) begin
        begins <= ends;
        compute_step <= compute_step + 1'b1;
        slot <= next_slot;
        loaded[slot] <= loads_nothing;
      end
      if (load_done) loaded[load_done_slot] <= 1'b1;
      tiles_open <= tiles_open + {{SLOT_BITS - 1{1'b0}}, compute_start && begins} -
          {{SLOT_BITS - 1{1'b0}}, store_done};
      stores_open <= stores_open + {{SLOT_BITS - 1{1'b0}}, ends} - {{SLOT_BITS - 1{1'b0}}, store_done};
    end
  end
endmodule
